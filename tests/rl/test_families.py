"""vLLM loads every family that it supports, answers like transformers, and has its parameters where the family's map says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, run
from zoo import KINDS

FAMILIES = sorted({family for family, _ in KINDS.values()})


@pytest.fixture(scope="module")
def answers(zoo: Path) -> dict[str, Any]:
    done = run(sys.executable, TESTS / "rl/families_program.py", *(zoo / family for family in FAMILIES), timeout=600)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(answers: dict[str, Any], family: str) -> None:
    assert answers[family]["vllm"] == answers[family]["hf"]
    assert answers[family]["wrong"] == []
