"""A moe model in every parallel layout, on ranks that share groups."""

from __future__ import annotations

from typing import Any

import pytest

from cuda.cases import Case, of_layouts
from cuda.matrix import assert_clean


@pytest.mark.parametrize("case", of_layouts("qwen3_moe"), ids=str)
def test_case(case: Case, outcomes: dict[str, dict[str, Any]]) -> None:
    assert_clean(case, outcomes[str(case)])
