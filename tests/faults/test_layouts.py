"""A run that goes on under one layout after the other is the run on one rank: the same rows, the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TESTS, metrics, mrlhf, python

from faults.runs import last, sft
from mrlhf.checkpoint.manifest import read_manifest

LAYOUTS: list[dict[str, object]] = [
    {"parallel.tensor_model_parallel_size": 2},
    {"parallel.pipeline_model_parallel_size": 2},
    {"parallel.sequence_parallel": "false"},  # two data-parallel ranks
]


def test_tp2_then_pp2_then_dp2_then_one_rank(world: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = sft(world, 8, **{"checkpoint.save_interval": 0, "data.packing": "false", "train.global_batch_size": 8})
    mrlhf(*args, "--train.output_dir", whole)
    program = (TESTS / "faults/stop_after_program.py", 2)
    for i, layout in enumerate(LAYOUTS):
        changed = [part for key, value in layout.items() for part in (f"--{key}", value)]
        stopped = python(*program, *args, *changed, "--train.output_dir", broken, ranks=2, check=False)
        assert f"stopped by the test after step {2 * i + 2}" in stopped.stdout, stopped.stderr[-3000:]
        manifest = read_manifest(last(broken))
        assert manifest["step"] == 2 * i + 2 and manifest["layout"]["world"] == 2
        assert (manifest["layout"]["tp"], manifest["layout"]["pp"], manifest["layout"]["dp"]) == [
            (2, 1, 1),
            (1, 2, 1),
            (1, 1, 2),
        ][i]
    mrlhf(*args, "--train.output_dir", broken)
    ours, theirs = metrics(broken), metrics(whole)
    assert [m["step"] for m in ours] == list(range(1, 9))
    for one, two in zip(theirs, ours, strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        assert {k: one[k] for k in ("train/num_tokens", "train/epoch", "train/lr")} == {
            k: two[k] for k in ("train/num_tokens", "train/epoch", "train/lr")
        }
    assert [read_manifest(last(d))["data"] for d in (whole, broken)].count(read_manifest(last(whole))["data"]) == 2


def test_a_hf_export_of_the_run(world: Path, tmp_path: Path) -> None:
    """At the interval and at the end, from two ranks; the same files as the converter gives."""
    args = sft(
        world,
        4,
        **{"checkpoint.save_interval": 2, "checkpoint.export_hf_interval": 2, "checkpoint.export_hf_at_end": "true"},
    )
    done = mrlhf(*args, "--parallel.tensor_model_parallel_size", 2, "--train.output_dir", tmp_path / "run", ranks=2)
    assert done.stdout.count("HF export: ") == 2, done.stderr[-3000:]
    assert sorted(p.name for p in (tmp_path / "run/hf").iterdir()) == ["step_2", "step_4"]
    python("tools/convert/megatron_to_hf.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "run/hf/step_4" / file.name).read_bytes()
