"""Every family's logits equal transformers' under every layout; new weights do not depend on the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TESTS, python
from zoo import KINDS, MOE

LAYOUTS = ("1", "tp2", "tp2+sp", "pp2")
EXPERT_LAYOUTS = ("ep2", "tp2xep2")
Results = dict[str, dict]


@pytest.fixture(scope="module")
def results(zoo: Path) -> Results:
    program = TESTS / "models/layouts_program.py"
    outputs = (python(program, zoo, "1"), python(program, zoo, *LAYOUTS[1:], *EXPERT_LAYOUTS, ranks=2))
    found: Results = {}
    for done in outputs:
        found |= json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_packed_and_unpacked(results: Results, layout: str, kind: str) -> None:
    assert results[layout][kind] < 1e-5


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("kind", MOE)
def test_experts_over_ranks(results: Results, layout: str, kind: str) -> None:
    assert results[layout][kind] < 1e-5
    assert results[layout]["random"] == pytest.approx(results["1"]["random experts"], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_near(results: Results, layout: str) -> None:
    assert 1e-4 < results[layout]["bfloat16"] < 0.2


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("what", ["values", "random"])
def test_new_weights_do_not_depend_on_the_layout(results: Results, layout: str, what: str) -> None:
    """The value head of a seed, and a whole model of a seed."""
    assert results[layout][what] == pytest.approx(results["1"][what], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vocab_parallel_logprobs(results: Results, layout: str) -> None:
    errors = results[layout]["logprobs"]
    assert max(errors["logps"], errors["entropy"], errors["grad"]) < 5e-6
    assert errors["is_top"] == 0
