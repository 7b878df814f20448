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
