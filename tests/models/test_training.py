"""Five steps of every family equal transformers' under the layouts that its parts are split by."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, run, torchrun
from zoo import KINDS, MOE, train_reference

# split over ranks: what no other kind splits in this way
SPLIT = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "olmo2", "glm4", "mixtral", "qwen3_moe_mixed", "deepseek_v3")
BALANCED = ("mixtral+balance", "deepseek_v3+balance")
LAYOUTS = {
    "1": (*KINDS, *BALANCED),
    "tp2": ("deepseek_v3_dense",),
    "tp2+sp": (*SPLIT, BALANCED[0]),
    "pp2": (*SPLIT, BALANCED[0]),
    "dp2": BALANCED,
    "cp2": BALANCED[:1],
    "ep2": (*MOE, BALANCED[0]),
    "tp2xep2": tuple(MOE),
}
CASES = [(layout, kind) for layout, kinds in LAYOUTS.items() for kind in kinds]


@pytest.fixture(scope="module")
def ours(zoo: Path) -> dict[str, Any]:
    program = TESTS / "models/training_program.py"
    arguments = [f"{layout}={','.join(kinds)}" for layout, kinds in LAYOUTS.items()]
    found: dict[str, Any] = {}
    for done in (run(sys.executable, program, zoo, arguments[0]), torchrun(2, program, zoo, *arguments[1:])):
        found |= json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    return found


@pytest.fixture(scope="module")
def theirs(zoo: Path) -> dict[str, Any]:
    found = {kind: train_reference(zoo, kind) for kind in KINDS}
    return found | {kind: train_reference(zoo, kind.removesuffix("+balance"), balanced=True) for kind in BALANCED}


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_steps_equal_transformers(ours: dict[str, Any], theirs: dict[str, Any], layout: str, kind: str) -> None:
    for step, (a, b) in enumerate(zip(ours[layout][kind], theirs[kind], strict=True)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), step
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), step
        for name in ("moe_aux_loss", "moe_z_loss") if kind in BALANCED else ():
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, step)
    assert theirs[kind][-1]["loss"] < theirs[kind][0]["loss"] - 0.05
