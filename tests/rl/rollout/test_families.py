"""vLLM loads every family that it supports, answers like transformers,
and has its parameters where the family's map says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, python
from zoo import KINDS

FAMILIES = sorted({family for family, _ in KINDS.values()})


@pytest.fixture(scope="module")
def answers(zoo: Path) -> dict[str, Any]:
    done = python(
        TESTS / "rl/rollout/families_program.py", *(zoo / family for family in FAMILIES), vllm=True, timeout=600
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(answers: dict[str, Any], family: str) -> None:
    assert answers[family]["vllm"] == answers[family]["hf"]
    assert answers[family]["wrong"] == []
