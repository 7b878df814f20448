"""Kinds of models 4 of 4: every layout of batches through every stage."""

from __future__ import annotations

from typing import Any

import pytest

from cuda.cases import Case, of_families
from cuda.matrix import assert_clean


@pytest.mark.parametrize("case", of_families(3, 4), ids=str)
def test_case(case: Case, outcomes: dict[str, dict[str, Any]]) -> None:
    assert_clean(case, outcomes[str(case)])
