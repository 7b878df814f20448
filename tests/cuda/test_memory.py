"""What --dry-run says of a rank's peak is what a rehearsed step reaches, within 5 %."""

from __future__ import annotations

import json

import pytest
from conftest import python

from cuda.memory_cases import CASES


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[int, int]]:
    """label -> (measured, estimated), of all cases."""
    done = python("-m", "cuda.memory_program", device="rehearsal", timeout=600)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("label", [case.label for case in CASES])
def test_the_estimate_is_the_rehearsed_peak(label: str, peaks: dict[str, tuple[int, int]]) -> None:
    measured, estimated = peaks[label]
    assert estimated == pytest.approx(measured, rel=0.05)
