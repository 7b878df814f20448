"""vLLM loads every family that it supports, answers like transformers,
and has its parameters where the family's map says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, python
from zoo import KINDS, MOE

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


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_vllm_reads_in_another_order_are_noticed(answers: dict[str, Any], family: str) -> None:
    """As on a GPU whose kernel for experts stores them otherwise, in tensors of the same names and shapes."""
    layer, *experts = answers[family]["spoilt"]
    assert "do not compute from the weights that were written" in layer and ".weight (by 1" in layer
    assert len(experts) == (family in MOE) and all("experts of MoE layer" in text for text in experts)
