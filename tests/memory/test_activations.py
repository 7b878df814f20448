"""What --dry-run says of activations is what autograd keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import TESTS, run, torchrun

KINDS = {1: "llama,gpt2,gemma2,olmo2,mixtral,deepseek_v3", 2: "llama,gpt2,mixtral"}


@pytest.mark.parametrize(("ranks", "tolerance"), [(1, 0.02), (2, 0.08)])
def test_the_formula_is_what_autograd_keeps(zoo: Path, ranks: int, tolerance: float) -> None:
    """Six kinds of layers, in fp32 and bf16, packed and padded, under every recomputation."""
    program = (TESTS / "memory/activations_program.py", zoo, KINDS[ranks])
    done = run(sys.executable, *program) if ranks == 1 else torchrun(ranks, *program)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert len(found) == len(KINDS[ranks].split(",")) * 2 * 3 * 3
    for *what, measured, formula in found:
        assert formula == pytest.approx(measured, rel=tolerance), what
