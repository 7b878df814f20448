"""PPO and GRPO steps with vLLM on the trainer's GPU: log-probs of both engines, the first ratio, sleep and reshard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TESTS, conversations, make_hf_model, make_tokenizer, write_jsonl

from gpu.places import in_places, program

GRPO = {"ppo.estimator": "grpo", "kl.in_loss": "true", "kl.kind": "k3", "loss.aggregation": "sequence"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and the prompts of 16 chats."""
    from mrlhf.data.prepare.job import preprocess
    from mrlhf.data.prepare.options import PreprocessConfig

    root, chats = tmp_path_factory.mktemp("prompts"), conversations(16)
    make_tokenizer(root / "tokenizer", [m["content"] for chat in chats for m in chat] + ["system user assistant"])
    file = write_jsonl(root / "prompts.jsonl", [{"prompt": c[:-1], "label": len(c)} for c in chats])
    options = {"input": (str(file),), "tokenizer": str(root / "tokenizer"), "output_prefix": str(root / "prompts")}
    preprocess(PreprocessConfig(task="prompts", **options, seq_length=128, workers=1))
    return root


REWARD = "def code_sum(prompts, completions, **_):\n    return [sum(map(ord, c)) % 7 / 7 for c in completions]\n"


def options(prompts: Path, out: Path, family: str, changes: dict[str, object]) -> list[object]:
    model = out / "model"
    make_hf_model(model, family, vocab_size=323, num_hidden_layers=2)
    shutil.copytree(prompts / "tokenizer", model, dirs_exist_ok=True)
    (out / "reward.py").write_text(REWARD)
    values = {
        "model.path": model,
        "model.dtype": "bfloat16",
        "data.train": prompts / "prompts",
        "train.output_dir": out / "run",
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.max_steps": 2,
        "optim.lr": 1e-4,
        "optim.lr_decay_style": "constant",
        "rollout.batch_size": 8,
        "rollout.n": 2,
        "rollout.max_new_tokens": 12,
        "rollout.kv_cache_mib": 64,
        "reward.sources": f"{out / 'reward.py'}:code_sum",
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", value)]


TP2_PP2 = {
    "parallel.tensor_model_parallel_size": 2,
    "parallel.sequence_parallel": "true",
    "parallel.pipeline_model_parallel_size": 2,
}
OVER_TWO = {"rollout.tensor_parallel_size": 2, "train.micro_batch_size": 1}
PARKED = {f"offload.{what}": "true" for what in ("reference", "optimizer", "gradients")}


@in_places(
    "algorithm,family,changes",
    cpu=[("ppo, parked", "llama", PARKED), ("grpo", "qwen3", {}), ("grpo, experts", "qwen3_moe", PARKED)],
    gpu=[
        ("ppo", "qwen2", {}),
        ("ppo, parked", "llama", PARKED),
        ("grpo", "qwen3", {}),
        ("grpo, fp8", "qwen3", {"rollout.weights": "fp8"}),
        ("grpo, experts", "qwen3_moe", PARKED),
    ],
    gpu8=[
        ("ppo, two replicas", "llama", {**TP2_PP2, "rollout.tensor_parallel_size": 4}),
        ("grpo, four replicas", "qwen3", {**TP2_PP2, **PARKED, "rollout.tensor_parallel_size": 2}),
        ("grpo, experts over ranks", "qwen3_moe", {"parallel.expert_model_parallel_size": 4, **OVER_TWO}),
    ],
)
def test_two_steps(
    prompts: Path, tmp_path: Path, place: str, algorithm: str, family: str, changes: dict[str, object]
) -> None:
    if place == "cuda":
        pytest.importorskip("vllm")
    more = dict(changes) | (GRPO if "grpo" in algorithm else {"ppo.critic": tmp_path / "model"})
    program(
        place, TESTS / "gpu/rl_program.py", tmp_path / "result.json",
        *options(prompts, tmp_path, family, more),
        ranks=8 if "rollout.tensor_parallel_size" in changes else 1, vllm=True, timeout=400,
    )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())
    first, second = found["logs"]
    names = ("actor/ratio_max_dev", "rollout/logprob_abs_diff_max", "rollout/kl_mismatch")
    print({name: [log[name] for log in found["logs"]] for name in names}, found["memory"], found["seconds"])
    exact = "fp8" not in algorithm  # whose weights are not the trainer's
    for log in (first, second):
        assert log["actor/ratio_max_dev"] < 0.05, "the first update's log-probs are those of the rollout's policy"
        assert log["rollout/logprob_abs_diff_max"] < (0.3 if exact else 2.0)
        assert log["rollout/kl_mismatch"] < (1e-3 if exact else 0.1)
        assert log["actor/grad_norm"] > 0
    assert first["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert found["answers"][0] == found["answers"][1], "asleep and written again, vLLM answers as before"
    assert found["copied"] > 0
    if place == "cuda":
        memory = found["memory"]
        assert memory["asleep"] < memory["awake"] - 0.05, "the key/value cache alone is 64 MiB"
        assert abs(memory["awake again"] - memory["awake"]) < 0.5
