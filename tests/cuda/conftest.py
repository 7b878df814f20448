"""The cases of a file are rehearsed together, in one process that has chosen the device before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import python

from cuda.cases import Case


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of this module's cases that were selected."""
    here = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in here if hasattr(item, "callspec")]
    return rehearse(cases, tmp_path_factory.mktemp("rehearsal"))


def rehearse(cases: list[Case], directory: Path) -> dict[str, dict[str, Any]]:
    wanted, written = directory / "cases.json", directory / "outcomes.json"
    wanted.write_text(json.dumps([(case.kind, case.layout, case.padding, case.stage) for case in cases]))
    python("-m", "cuda.rehearse_program", wanted, written, device="rehearsal", timeout=540)
    return json.loads(written.read_text())
