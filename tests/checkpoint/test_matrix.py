"""A run goes on under any layout as under its own: every pair of the table in docs/checkpoints.md is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TESTS, make_hf_model, python

from checkpoint.matrix_program import ALONE, LAYOUTS

NAMES = (ALONE, *LAYOUTS)
LOSS, GRAD_NORM = 2e-6, 2e-5  # largest relative differences to one process that has not stopped


@pytest.fixture(scope="module")
def steps(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By reader, then by writer; "unbroken": the steps of a writer that has not stopped."""
    work, hf = tmp_path_factory.mktemp("matrix") / "checkpoints", tmp_path_factory.mktemp("hf")
    make_hf_model(hf, "qwen3_moe", vocab_size=320, num_hidden_layers=2, hidden_size=64, moe_intermediate_size=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world / "qwen3_moe" / name, hf / name)
    result: dict[str, Any] = {name: {} for name in NAMES}
    for ranks in (1, 4, 1):
        done = python(TESTS / "checkpoint/matrix_program.py", hf, world / "sft_few", work, ranks=ranks)
        for name, found in json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))[7:]).items():
            result[name] |= found
    return result


def cell(ours: list[dict[str, float]], wanted: list[dict[str, float]]) -> str:
    """ "=", or how far two steps are from the wanted ones."""
    far = [abs(a[key] / b[key] - 1) for a, b in zip(ours, wanted, strict=True) for key in ("loss", "grad_norm")]
    equal = (
        max(far[::2]) <= LOSS and max(far[1::2]) <= GRAD_NORM and all(a["lr"] == b["lr"] for a, b in zip(ours, wanted))
    )
    return "=" if equal else f"{max(far):.0e}"


def test_every_layout_goes_on_from_every_other(steps: dict[str, Any]) -> None:
    wanted = steps[ALONE]["unbroken"]
    lines = [f"| saved by, resumed by | {' | '.join(NAMES)} |", f"|---|{'---|' * len(NAMES)}"]
    for writer in NAMES:
        assert cell(steps[writer]["unbroken"], wanted) == "=", writer
        lines.append(f"| {writer} | {' | '.join(cell(steps[reader][writer], wanted) for reader in NAMES)} |")
    table = "\n".join(lines)
    assert all(cell(steps[reader][writer], wanted) == "=" for reader in NAMES for writer in NAMES), f"\n{table}"
    assert table in (ROOT / "docs/checkpoints.md").read_text(), f"docs/checkpoints.md has another table than\n{table}"
