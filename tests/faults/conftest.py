"""No run outlives its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.runs import Run


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for run in Run.started:
        run.end()
    Run.started.clear()
