"""examples/loops/ write the loops out with the library's parts: they compute what the stages compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import metrics, mrlhf, python

from mrlhf.checkpoint.source import open_source

STEPS = 4


def printed(text: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_sft(world: Path, tmp_path: Path) -> None:
    """Two ranks, TP 2 with sequence parallelism."""
    stage = {
        "model.path": world / "qwen2",
        "model.dtype": "float32",
        "data.train": world / "sft",
        "train.output_dir": tmp_path / "run",
        "train.global_batch_size": 2,
        "train.max_steps": STEPS,
        "optim.lr": 1e-3,
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": "true",
    }
    mrlhf("sft", *(part for key, value in stage.items() for part in (f"--{key}", value)), ranks=2)
    loop = {
        "model": world / "qwen2",
        "data": world / "sft",
        "output": tmp_path / "loop",
        "tensor-parallel": 2,
        "dtype": "float32",
        "global-batch-size": 2,
        "max-steps": STEPS,
        "lr": 1e-3,
    }
    args = [part for key, value in loop.items() for part in (f"--{key}", value)]
    steps = printed(python("examples/loops/sft_loop.py", *args, ranks=2).stdout)
    assert len(steps) == STEPS
    for mine, theirs in zip(steps, metrics(tmp_path / "run"), strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert mine[name] == pytest.approx(theirs[f"train/{name}"], rel=1e-6), (mine["step"], name)
    assert open_source(str(tmp_path / f"loop/step_{STEPS}")).head == "lm"


def test_ppo(world: Path, tmp_path: Path) -> None:
    """Two ranks, TP 2 for the trainer and for vLLM, a critic, a reference, a Python reward."""
    reward = "examples/rewards/length_penalty.py:length_penalty"
    stage = {
        "model.path": world / "qwen2", "model.dtype": "float32", "data.train": world / "prompts", "train.output_dir": tmp_path / "run",
        "train.global_batch_size": 4, "train.micro_batch_size": 2, "train.max_steps": 2, "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": "true", "rollout.batch_size": 4, "rollout.n": 2, "rollout.max_new_tokens": 8,
        "rollout.tensor_parallel_size": 2, "rollout.kv_cache_mib": 64, "reward.sources": reward, "ppo.critic": world / "qwen2",
    }  # fmt: skip
    mrlhf("ppo", *(part for key, value in stage.items() for part in (f"--{key}", value)), ranks=2)
    loop = {"actor": world / "qwen2", "critic": world / "qwen2", "prompts": world / "prompts", "reward": reward, "dtype": "float32",
            "output": tmp_path / "loop", "tensor-parallel": 2, "prompts-per-rollout": 4, "answers-per-prompt": 2,
            "max-new-tokens": 8, "steps": 2}  # fmt: skip
    args = [part for key, value in loop.items() for part in (f"--{key}", value)]
    steps = printed(python("examples/loops/ppo_loop.py", *args, ranks=2, vllm=True).stdout)
    assert len(steps) == 2
    for mine, theirs in zip(steps, metrics(tmp_path / "run"), strict=True):
        assert mine["score"] == pytest.approx(theirs["critic/score/mean"], rel=1e-6)
        for name in ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (mine["step"], name)
