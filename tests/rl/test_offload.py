"""One owner of the device: a vLLM that is awake and parts of the trainer that wait on the host never meet there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import TESTS, metrics, python

from mrlhf.checkpoint.manager import is_whole
from rl.test_ppo import options, reward_model  # noqa: F401  (a fixture)

PARKED = {f"offload.{what}": "true" for what in ("reference", "reward", "optimizer", "gradients")}
OF_THE_TRAINER = ("an update", "a resume", "a forward pass", "a save")
TALK = """
class Talk:
    def reset(self, record):
        pass

    def step(self, messages, text):
        return {"role": "tool", "content": "and then?"}, float(len(text) % 3), False
"""


def run(result: Path, *args: object, interrupted: int = 0) -> tuple[int, list[dict[str, Any]]]:
    python(TESTS / "rl/owner_program.py", result, interrupted, *args, vllm=True)
    done = json.loads(result.read_text())
    return done["status"], done["events"]


def check_turns(events: list[dict[str, Any]], *, expected: set[str]) -> None:
    seen = {e["event"] for e in events}
    assert expected <= seen, expected - seen
    together = [e for e in events if e["awake"] and e["here"]]
    assert not together, f"parts of the trainer are on the device while vLLM is awake: {together[:3]}"
    awake = [e for e in events if e["awake"] and e["event"] in OF_THE_TRAINER]
    assert not awake, f"the trainer works while vLLM holds its memory: {awake[:3]}"
    generating = [e for e in events if e["event"] == "vllm generates"]
    assert all(e["awake"] == ["kv_cache", "weights"] for e in generating)
    exchanging = [e for e in events if e["event"] == "the exchange of weights"]
    assert all(e["awake"] == ["weights"] for e in exchanging), "the cache has no memory yet"
    # what the run names was there when it was needed
    updates = {part for e in events if e["event"] == "an update" for part in e["here"]}
    assert {"actor gradients", "actor optimizer"} <= updates
    saves = [e for e in events if e["event"] == "a save"]
    assert all("actor optimizer" in e["here"] for e in saves)


def test_a_run_with_every_model_is_interrupted_and_resumed(
    world: Path,
    reward_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    args = options(world, reward_model, **PARKED, **{"data.eval": world / "prompts", "train.eval_interval": 1,
                                                     "checkpoint.async_save": "true", "train.max_steps": 2,
                                                     "train.output_dir": tmp_path / "run"})  # fmt: skip
    status, events = run(tmp_path / "first.json", *args, interrupted=2)
    everything = {"build vllm", "wake weights", "wake kv_cache", *OF_THE_TRAINER, "vllm generates"}
    assert status == 75
    check_turns(events, expected=everything - {"a resume"})
    status, events = run(tmp_path / "second.json", *args)
    assert status == 0
    check_turns(events, expected=everything)
    lines = [line for line in metrics(tmp_path / "run") if "actor/loss" in line or "rollout/kl_mismatch" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert is_whole(tmp_path / "run/checkpoints/step_2"), "saved in the background as the run ended"
    # a vLLM without its weights writes NaN
    assert all(line["rollout/logprob_abs_diff_max"] < 1e-3 for line in lines)


def test_refills_an_environment_and_ptx(world: Path, reward_model: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "talk.py").write_text(TALK)
    changes = {
        **PARKED,
        "ppo.estimator": "grpo",
        "rollout.dynamic_sampling": "true",
        "rollout.environment": f"{tmp_path}/talk.py:Talk",
        "rollout.max_turns": 2,
        "rollout.max_new_tokens": 16,
        "reward.equal_tolerance": 0.3,
        "ptx.coef": 0.1,
        "ptx.data": world / "sft",
        "ptx.batch_size": 2,
        "train.output_dir": tmp_path / "run",
    }
    status, events = run(tmp_path / "result.json", *options(world, reward_model, **changes))
    assert status == 0
    check_turns(events, expected={"build vllm", "vllm generates", "an update", "a save"})
    line = metrics(tmp_path / "run")[0]
    assert line["rollout/prompts_drawn"] > 8 and line["rollout/logprob_abs_diff_max"] < 1e-3
