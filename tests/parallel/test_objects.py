"""Python objects and small host tensors go over gloo where the device has another backend."""

from __future__ import annotations

import ast
import json

import pytest
from conftest import ROOT, TESTS, python

from mrlhf.parallel.device import Device


@pytest.mark.parametrize(
    ("here", "backend"),
    [(Device("cpu", "gloo"), "gloo"), (Device("cuda", "nccl"), "cpu:gloo,cuda:nccl"), (Device("cuda", "fake"), "fake")],
)
def test_backend_of_the_world(here: Device, backend: str) -> None:
    assert here.world_backend == backend


def test_objects_arrive_without_the_device() -> None:
    done = python(TESTS / "parallel/objects_program.py", ranks=2)
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert result["last stage"] == {"loss": 1}
    assert result["all"] == result["data parallel"] == [0, 1]
    assert result["any"] == [True, False]
    backends = result["backends"]
    assert backends["pp"] == backends["dp"] == ["cpu", "cuda"]
    assert all(devices == ["cuda"] for name, devices in backends.items() if name not in ("pp", "dp"))


def test_objects_take_a_group_that_has_gloo() -> None:
    """The default group, the pipeline's, the data-parallel one, or a group made for it."""
    with_group = set()
    for path in (ROOT / "mrlhf").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func).startswith("dist.") and "object" in ast.unparse(call.func):
                with_group |= {(path.name, ast.unparse(k.value)) for k in call.keywords if k.arg == "group"}
    assert with_group == {("state.py", "pp"), ("state.py", "dp"), ("environments.py", "self.group")}
