"""A run that goes on under one layout after the other is the run on one rank: the same rows, the same losses."""

from __future__ import annotations

import shutil
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
    ranks = ("--parallel.tensor_model_parallel_size", 2, "--train.output_dir", tmp_path / "run")
    done = mrlhf(*args, *ranks, ranks=2)
    assert done.stdout.count("HF export: ") == 2, done.stderr[-3000:]
    assert sorted(p.name for p in (tmp_path / "run/hf").iterdir()) == ["step_2", "step_4"]
    python("tools/convert/megatron_to_hf.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "run/hf/step_4" / file.name).read_bytes()
    shutil.rmtree(tmp_path / "run/hf")  # as a run that was killed in its exports leaves it
    (tmp_path / "run/hf/step_4").mkdir(parents=True)  # an empty directory is no export
    again = mrlhf(*args, *ranks, ranks=2)
    assert again.stdout.count("HF export: ") == 2 and "already finished" in again.stdout
    assert "step 4/4" not in again.stdout
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "run/hf/step_4" / file.name).read_bytes()


BLENDS = {
    "two": "[{prefix: SFT, weight: 0.75, epochs: 2}, {prefix: FEW, weight: 0.25, loss_weight: 0.5}]",
    "plain": "[SFT, FEW]",
    "one in a list": "[{prefix: SFT, epochs: 2}]",
}


@pytest.mark.parametrize("blend", BLENDS)
def test_a_run_on_a_blend_is_exported(world: Path, tmp_path: Path, blend: str) -> None:
    """At its end, from its directory and from its checkpoint. The card lists the sources."""
    data = BLENDS[blend].replace("SFT", str(world / "sft")).replace("FEW", str(world / "sft_few"))
    run = tmp_path / "run"
    args = sft(world, 1, **{"data.train": data, "checkpoint.export_hf_at_end": "true", "train.output_dir": run})
    mrlhf(*args)
    for i, path in enumerate((run, run / "checkpoints/step_1")):
        python("tools/convert/megatron_to_hf.py", "--checkpoint", path, "--output", tmp_path / f"hf{i}")
    cards = {(d / "README.md").read_text() for d in (run / "hf/step_1", tmp_path / "hf0", tmp_path / "hf1")}
    (card,) = cards
    lines = [line for line in card.splitlines() if line.startswith("- train data: ")]
    few, whole = f"- train data: {world}/sft_few", f"- train data: {world}/sft"
    wanted = {
        "two": [f"{whole}, weight 0.75, epochs 2.0", f"{few}, weight 0.25, loss_weight 0.5"],
        "plain": [whole, few],
        "one in a list": [f"{whole}, epochs 2.0"],
    }
    assert lines == wanted[blend]
    assert card.count("  - .bin: sha256 ") == len(lines) and "  - 48 samples" in card


def test_an_export_that_fails_ends_the_run_with_an_error_and_the_same_command_makes_it(
    world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = sft(world, 2, **{"checkpoint.export_hf_at_end": "true", "train.output_dir": run})
    blocked = run / "hf/step_2"
    blocked.parent.mkdir(parents=True)
    blocked.symlink_to("nowhere")  # no export, and a directory cannot be renamed over it
    for trained in (True, False):
        done = mrlhf(*args, check=False)
        assert done.returncode == 2 and ("step 2/2" in done.stdout) == trained
        assert "failed with status 2" in done.stderr and f"{run / 'hf'}: no HF export of step_2" in done.stderr
        assert last(run).name == "step_2"
    blocked.unlink()
    done = mrlhf(*args)
    assert "step 2/2" not in done.stdout and (run / "hf/step_2/model.safetensors").is_file()
    assert [p.name for p in (run / "hf").iterdir()] == ["step_2"]


def test_a_card_that_cannot_be_written_costs_no_weights(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mrlhf(*sft(world, 1, **{"train.output_dir": run}))
    (run / "config.yaml").write_text("data: [")
    args = ("--checkpoint", run, "--output", tmp_path / "hf")
    done = python("tools/convert/megatron_to_hf.py", *args)
    assert (tmp_path / "hf/model.safetensors").is_file() and not (tmp_path / "hf/README.md").exists()
    assert "has no model card" in done.stderr and f"{run / 'config.yaml'}:1: not valid YAML" in done.stderr
