"""Every supervised stage learns its toy, and learns it as it did before: tests/fixtures/curves holds what it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TESTS, run

STAGES = ("pretrain", "sft", "rm", "dpo")


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("curves")
    run(sys.executable, TESTS / "training/curves_program.py", folder)
    return {stage: json.loads((folder / f"curves/{stage}.json").read_text()) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_as_before(curves: dict[str, dict[str, Any]], stage: str) -> None:
    """To 2 %, or 0.02: another processor's rounding grows over the steps."""
    before = json.loads(Path(ROOT, f"tests/fixtures/curves/{stage}.json").read_text())
    assert curves[stage]["loss"] == pytest.approx(before["loss"], rel=0.02, abs=0.02)
    assert {key: curves[stage]["eval"][key] for key in before["eval"]} == pytest.approx(
        before["eval"], rel=0.05, abs=0.05
    )


def test_bfloat16_tracks_fp32(curves: dict[str, dict[str, Any]]) -> None:
    """Within 1 % of the loss at each of the 60 steps."""
    fp32, bf16 = curves["pretrain"]["loss"], curves["pretrain"]["bfloat16"]
    assert len(fp32) >= 50 and bf16 == pytest.approx(fp32, rel=0.01)


def test_they_learn(curves: dict[str, dict[str, Any]]) -> None:
    """Held-out pairs: reward model and DPO above 0.9; a language model that predicts the toy's texts."""
    assert curves["rm"]["eval"]["eval/accuracy"] > 0.9
    assert curves["dpo"]["eval"]["eval/rewards/accuracies"] > 0.9 and curves["dpo"]["loss"][0] == pytest.approx(
        0.693147, abs=1e-5
    )
    assert curves["pretrain"]["loss"][0] > 5 and curves["pretrain"]["loss"][-1] < 2
    assert curves["sft"]["loss"][-1] < 0.5 * curves["sft"]["loss"][0]
