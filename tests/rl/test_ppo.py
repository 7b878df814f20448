"""PPO on the real engines: vLLM has the trainer's weights, ratios start at 1, and no layout changes a number."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TESTS, make_hf_model, metrics, mrlhf, python

BY_TOKENS = {"train.micro_batch_size": 1, "train.max_tokens_per_micro_batch": 200}
LAYOUTS = {
    "1 process": (1, {}),
    "tp2, critic pp2, vllm tp2": (
        2,
        {
            "parallel.tensor_model_parallel_size": 2,
            "parallel.sequence_parallel": "true",
            "ppo.critic_tensor_model_parallel_size": 1,
            "ppo.critic_pipeline_model_parallel_size": 2,
            "rollout.tensor_parallel_size": 2,
        },
    ),
    "pp2, interleaved, padded, by tokens, vllm 2 x tp1": (
        2,
        {
            "parallel.pipeline_model_parallel_size": 2,
            "parallel.virtual_pipeline_model_parallel_size": 2,
            "rollout.tensor_parallel_size": 1,
            "data.packing": "false",
            **{f"offload.{what}": "true" for what in ("reference", "reward", "optimizer", "gradients")},
            **BY_TOKENS,
        },
    ),
    "cp2, by tokens, vllm tp2, packed": (
        2,
        {
            "parallel.context_parallel_size": 2,
            "rollout.tensor_parallel_size": 2,
            "rollout.weights": "packed",
            **BY_TOKENS,
        },
    ),
    "tp2, vllm tp1 on a rank of its own": (
        3,
        {"parallel.tensor_model_parallel_size": 2, "rollout.placement": "separate", "rollout.num_ranks": 1},
    ),
    "tp2 x pp2, critic tp2 x dp2, vllm 2 x tp2": (
        4,
        {
            "parallel.tensor_model_parallel_size": 2,
            "parallel.pipeline_model_parallel_size": 2,
            "ppo.critic_pipeline_model_parallel_size": 1,
            "rollout.tensor_parallel_size": 2,
        },
    ),
}


@pytest.fixture(scope="module")
def reward_model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rm")
    mrlhf("rm", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", world / "pref",
          "--train.output_dir", out, "--train.global_batch_size", 4, "--optim.lr", 1e-3)  # fmt: skip
    return out


def options(world: Path, reward_model: Path, **changes: object) -> list[object]:
    values = {
        "model.path": world / "qwen2",
        "model.dtype": "float32",
        "data.train": world / "prompts",
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.max_steps": 2,
        "optim.lr": 1e-4,  # Adam moves parameters whose true gradient is 0 by +-lr on rounding noise
        "ppo.critic_lr": 1e-4,
        "optim.lr_decay_style": "constant",
        "ppo.epochs": 2,
        "rollout.batch_size": 8,
        "rollout.n": 2,
        "rollout.max_new_tokens": 12,
        "rollout.temperature": 0.8,
        "rollout.kv_cache_mib": 64,
        "reward.sources": f"model:{reward_model}",
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", value)]


@pytest.fixture(scope="module")
def results(world: Path, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, Path]]:
    found = {}
    for name, (ranks, layout) in LAYOUTS.items():
        out = tmp_path_factory.mktemp("ppo")
        args = options(world, reward_model, **layout, **{"train.output_dir": out / "checkpoint"})
        done = python(TESTS / "rl/ppo_program.py", out / "result.json", *args, ranks=ranks, vllm=True)
        found[name] = (json.loads((out / "result.json").read_text()), out)
        (out / "stderr.txt").write_text(done.stderr)
    return found


def test_first_ratio_is_one_and_vllm_agrees_with_the_trainer(results: dict[str, tuple[dict, Path]]) -> None:
    for result, _ in results.values():
        for log in result["logs"][:2]:
            assert log["actor/ratio_max_dev"] < 1e-5
            assert log["rollout/logprob_abs_diff_max"] < 1e-3
            assert log["rollout/kl_mismatch"] < 1e-6
        assert result["logs"][0]["objective/kl"] == pytest.approx(0, abs=1e-6)
        assert result["logs"][1]["objective/kl"] != 0, "the update did not reach vLLM"


def test_a_sampler_that_is_not_the_policy_raises_a_warning(results: dict[str, tuple[dict, Path]]) -> None:
    """Before step 3 vLLM's weights were spoilt; rollout.correction is none."""
    for result, out in results.values():
        found = result["logs"][2]
        assert found["rollout/kl_mismatch"] > 0.01 > 1e-6 > result["logs"][1]["rollout/kl_mismatch"]
        warnings = [line for line in (out / "stderr.txt").read_text().splitlines() if "kl_mismatch" in line]
        assert len(warnings) == 1, warnings
        assert (
            warnings[0].startswith("warning: step 3: ")
            and f"rollout/kl_mismatch {found['rollout/kl_mismatch']:.3g} > 0.01" in warnings[0]
        )
        assert "not corrected" in warnings[0]


def test_the_layout_changes_no_number(results: dict[str, tuple[dict, Path]]) -> None:
    first, *others = (result["logs"] for result, _ in results.values())
    keys = [
        k
        for k in first[0]
        if k.startswith(("actor/", "critic/", "objective/", "response_length/", "reward/")) and "ratio_max_dev" not in k
    ]
    assert "actor/grad_norm" in keys and "critic/vf_loss" in keys
    for logs in others:
        for key in keys:
            assert logs[0][key] == pytest.approx(first[0][key], rel=1e-5, abs=1e-6), key
    received = {name: result["received"] for name, (result, _) in results.items()}
    assert received["tp2, critic pp2, vllm tp2"] == 0, "with one layout on both sides nothing moves between ranks"
    assert received["pp2, interleaved, padded, by tokens, vllm 2 x tp1"] > 0
    parked = {name: result["parked"] for name, (result, _) in results.items()}
    assert (
        parked["tp2, critic pp2, vllm tp2"] == []
        and len(parked["pp2, interleaved, padded, by tokens, vllm 2 x tp1"]) == 2 + 2 + 2
    )
    assert all(log["memory/gen_gib"] > 0 for result, _ in results.values() for log in result["logs"])


def test_critics_are_saved_whole_whatever_cuts_them(results: dict[str, tuple[dict, Path]]) -> None:
    first, *others = (weights(out / "checkpoint/critic/dist") for _, out in results.values())
    assert "output_layer.weight" in first, list(first)
    for found in others:
        assert found.keys() == first.keys()
        for (
            name,
            value,
        ) in (
            found.items()
        ):  # answers drawn after the first update may differ: the updates have moved each by 1e-3 at most
            torch.testing.assert_close(value, first[name], rtol=0, atol=2e-3)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(directory)
    found = {
        k: torch.empty(v.size) for k, v in reader.read_metadata().state_dict_metadata.items() if hasattr(v, "size")
    }
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def test_greedy_answers_equal_transformers_on_the_export(results: dict[str, tuple[dict, Path]]) -> None:
    from transformers import AutoModelForCausalLM

    for result, out in results.values():
        python("tools/convert/megatron_to_hf.py", "--checkpoint", out / "checkpoint", "--output", out / "hf")
        model = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
        assert len(result["prompts"]) == 32
        for prompt, answer in zip(result["prompts"], result["answers"], strict=True):
            ids = torch.tensor([prompt])
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )
            assert answer == expected[0, len(prompt) :].tolist()


def test_experts_reach_vllm(world: Path, reward_model: Path, tmp_path: Path) -> None:
    """A mixture of experts spread over the ranks in the trainer, cut by tensor parallelism in vLLM."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "moe").mkdir(exist_ok=True)
        shutil.copy(world / "qwen2" / file, tmp_path / "moe" / file)
    make_hf_model(tmp_path / "moe", "qwen3_moe", vocab_size=323, num_hidden_layers=2)
    changes = {
        "model.path": tmp_path / "moe",
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": "true",
        "parallel.expert_model_parallel_size": 2,
        "rollout.tensor_parallel_size": 2,
        "ppo.estimator": "grpo",
        "train.deterministic": "true",  # torch refuses no operation of the trainer, and vLLM has its own
        "train.output_dir": tmp_path / "checkpoint",
    }
    python(
        TESTS / "rl/ppo_program.py",
        tmp_path / "result.json",
        *options(world, reward_model, **changes),
        ranks=2,
        vllm=True,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    test_first_ratio_is_one_and_vllm_agrees_with_the_trainer({"": (result, tmp_path)})
    test_greedy_answers_equal_transformers_on_the_export({"": (result, tmp_path)})
    assert result["received"] > 0


class _LengthServer(BaseHTTPRequestHandler):
    """A remote reward: the number of characters of each completion; its first request fails."""

    requests = 0

    def do_POST(self) -> None:
        type(self).requests += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"scores": [float(len(c)) for c in body["completions"]]}).encode()
        self.send_response(503 if self.requests == 1 else 200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Quiet."""


ENVIRONMENT = """
class Talk:
    def reset(self, record):
        assert "<|im_start|>assistant" in record["prompt"] and record["label"] in (2, 3, 4, 5)

    def step(self, messages, text):
        # vLLM ends a turn with the token that completes a stop string
        assert "a" not in text or len(text) - text.index("a") <= 12, text
        interrupted = "a" in text
        return " go on" if interrupted else {"role": "tool", "content": "and then?"}, 0.25, False
"""


def test_grpo_with_every_option_an_environment_and_three_kinds_of_reward(
    world: Path, reward_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "talk.py").write_text(ENVIRONMENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _LengthServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    length_penalty = "examples/rewards/length_penalty.py:length_penalty"
    sources = f"model:{reward_model},{length_penalty},http://127.0.0.1:{server.server_port}/score"
    extra = {
        "train.output_dir": tmp_path,
        "data.eval": world / "prompts",
        "reward.sources": sources,
        "reward.weights": "1,1,0.1",
        "reward.clip": 100,
        "ppo.estimator": "grpo",
        "ppo.ratio": "sequence",
        "ppo.entropy_coef": 0.01,
        "ppo.dual_clip": 3,
        "kl.in_loss": "true",
        "kl.kind": "k3",
        "loss.aggregation": "sequence",
        "rollout.correction": "tis",
        "rollout.environment": f"{tmp_path}/talk.py:Talk",
        "rollout.max_turns": 3,
        "rollout.max_new_tokens": 48,
        "rollout.stop": "a",
        "rollout.stop_token_ids": ",".join(map(str, range(200, 260))),
        "rollout.dynamic_sampling": "true",
        "ptx.coef": 0.1,
        "ptx.data": world / "sft",
        "ptx.batch_size": 2,
    }
    mrlhf("ppo", *options(world, reward_model, **extra))
    server.shutdown()
    lines = metrics(tmp_path)
    parts = {k: v for k, v in lines[0].items() if k.startswith("reward/")}
    assert len(parts) == 4 and _LengthServer.requests >= 4
    model, function, http = (
        next(v for k, v in parts.items() if k.startswith("reward/" + kind)) for kind in ("model", "function", "http")
    )
    assert http > 0 and function == 0
    assert lines[0]["critic/score/mean"] == pytest.approx(
        model + function + 0.1 * http + parts["reward/environment"], rel=1e-5
    )
    # the trainer reads every conversation as vLLM did, observations included
    assert lines[0]["rollout/logprob_abs_diff_max"] < 1e-3 and lines[0]["rollout/kl_mismatch"] < 1e-6
    assert lines[0]["environment/turns/mean"] > 1.5 and lines[0]["environment/observed_tokens/mean"] > 2
    assert parts["reward/environment"] > 0.3
    assert (lines[0]["rollout/prompts_drawn"], lines[0]["rollout/groups_dropped"]) == (8, 0) and lines[0][
        "actor/ptx_loss"
    ] > 1
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert "critic/vf_loss" not in lines[0] and lines[0]["actor/ratio_max_dev"] < 1e-5
    assert "eval/score/mean" in lines[-1]
    assert (tmp_path / "samples/step_1.jsonl").is_file()
    assert (tmp_path / "logs/reward_length_penalty.py_length_penalty.log").is_file(), "what the function prints"
