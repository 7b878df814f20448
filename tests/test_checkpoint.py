"""A checkpoint is whole or not there, and goes on under any layout as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, run, torchrun

from mrlhf.checkpoint import Best, open_source, retain
from mrlhf.errors import CheckpointError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(world: Path, work: Path) -> dict[str, Any]:
    args = (TESTS / "checkpoint_program.py", world / "qwen2", world / "sft", work)
    result: dict[str, Any] = {}
    for done in (torchrun(2, *args), run(sys.executable, *args)):
        result |= json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    return result


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, "float32") for layout in ("pp2", "dp2", "tp2+sp", "interleaved", "cp2", "1")),
        ("pp2", "bfloat16"),
        ("1", "bfloat16"),
    ],
)
def test_goes_on_under_another_layout(found: dict[str, Any], layout: str, dtype: str) -> None:
    """Weights, both moments, the step count and the schedule: all enter the loss of the second step after the load."""
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    for ours, unbroken in zip(found[f"{layout} {dtype}"], found[f"tp2 {dtype}"], strict=True):
        assert ours["loss"] == pytest.approx(unbroken["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(unbroken["grad_norm"], rel=10 * tolerance)
        assert ours["lr"] == unbroken["lr"]
    assert found[f"{layout} {dtype}"][1]["loss"] < found["first"][0]["loss"]


def test_saved_by_an_interleaved_pipeline_and_gone_on_with_by_one_process(found: dict[str, Any]) -> None:
    for ours, unbroken in zip(found["after interleaved"], found["interleaved, unbroken"], strict=True):
        assert ours["loss"] == pytest.approx(unbroken["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(unbroken["grad_norm"], rel=1e-5)
        assert ours["lr"] == unbroken["lr"]


def test_failed_save_leaves_the_last_one(found: dict[str, Any]) -> None:
    assert found["after_failure"] == ["latest", "step_1", "step_2.tmp"]
    assert found["latest_after_failure"] == 1
    assert found["after_recovery"] == ["latest", "step_4", "step_5"], "unfinished saves are cleared, the two newest kept"


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    """By the lowest or highest value, the earliest of equals; without a value a checkpoint is never the best."""
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 1.0, 10: 2.0}

    def kept(best: Best | None, keep_last: int) -> list[str]:
        directory = tmp_path / f"{best} {keep_last}"
        for step, value in losses.items():
            (directory / f"step_{step}").mkdir(parents=True)
            (directory / f"step_{step}/mrlhf.json").write_text(json.dumps({"eval": {} if value is None else {"eval/loss": value}}))
            retain(directory, f"step_{step}", keep_last=keep_last, best=best)
        assert (directory / "latest").read_text() == "step_10\n"
        if best is not None and best.metric == "eval/loss":
            assert (directory / "best").read_text() == ("step_1\n" if best.highest else "step_2\n")
        return sorted(p.name for p in directory.glob("step_*"))

    assert kept(None, 2) == ["step_10", "step_4"]
    assert kept(Best("eval/loss", False), 1) == ["step_10", "step_2"]
    assert kept(Best("eval/loss", True), 2) == ["step_1", "step_10", "step_4"]
    assert kept(Best("eval/other", True), 1) == ["step_10"]


def test_heads(found: dict[str, Any]) -> None:
    assert found["value_head"] == ["value", 5]
    assert found["value_reloaded"], "a value model's own head is loaded, not drawn"
    assert "no LM head" in found["value_to_lm"]
    assert found["fresh_head_same"], "an LM's fresh head depends on the seed only"
    assert found["body_kept"]


def test_read_in_another_dtype(found: dict[str, Any]) -> None:
    assert found["bfloat16_as_float32"] and found["float32_as_bfloat16"]
    assert found["to_resume"] == 2


@pytest.mark.parametrize("what", ["unstepped", "whole_optimizer"])
def test_other_optimizer_states(found: dict[str, Any], what: str) -> None:
    """An optimizer that has not stepped yet (an actor while its critic warms up), and use_distributed_optimizer false."""
    unbroken, resumed = found[what]
    assert resumed == unbroken


@pytest.fixture
def copied(found: dict[str, Any], work: Path, tmp_path: Path) -> Path:
    """A run's directory to damage."""
    return Path(shutil.copytree(work / "killed", tmp_path / "run"))


def test_damage_is_found_when_it_is_opened(copied: Path) -> None:
    assert open_source(str(copied)).path.name == "step_5"
    file = max((copied / "checkpoints/step_5/dist").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"of another size: dist/{file.name}"):
        open_source(str(copied))
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_source(str(copied))
    assert open_source(str(copied / "checkpoints/step_4")).manifest["step"] == 4


def test_latest_that_points_nowhere(copied: Path) -> None:
    (copied / "checkpoints/latest").write_text("step_77\n")
    assert open_source(str(copied)).path.name == "step_5"
    (copied / "checkpoints/latest").write_text("../../etc\n")
    assert open_source(str(copied / "checkpoints")).path.name == "step_5"
    (copied / "checkpoints/step_5/mrlhf.json").unlink()
    assert open_source(str(copied)).path.name == "step_4", "what has no manifest was never finished"


def test_other_things_are_refused(copied: Path, tmp_path: Path) -> None:
    manifest = copied / "checkpoints/step_5/mrlhf.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        open_source(str(copied))
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        open_source(str(copied))
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a HF model"):
        open_source(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such directory"):
        open_source(str(tmp_path / "nothing"))


def test_optimizer_state_of_experts_over_ranks_is_not_that_of_experts_cut() -> None:
    """Megatron has an optimizer for each then, and other names; without this a KeyError of 40 kB."""
    from mrlhf.checkpoint import check_optimizer_names

    one, two = ["optimizer.state.exp_avg.x", "x"], ["chained_0.optimizer.state.exp_avg.x", "x"]
    check_optimizer_names(one, spread=False, where="here")
    check_optimizer_names(two, spread=True, where="here")
    for names, spread, wanted in ((one, True, "= 1"), (two, False, "above 1")):
        with pytest.raises(CheckpointError, match=f"written with parallel.expert_model_parallel_size {wanted}"):
            check_optimizer_names(names, spread=spread, where="here")
