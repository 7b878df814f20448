"""What the rehearsal itself counts and refuses; its use is in the other files."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from conftest import python

from mrlhf.errors import EnvironmentProblem
from mrlhf.parallel import device
from mrlhf.parallel.rehearsal import Rehearsal

MIB = 1 << 20


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    done = python("-m", "cuda.rehearsal_program", device="rehearsal")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_it_needs_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="has chosen another device"):
        Rehearsal()
    device.current.cache_clear()
    monkeypatch.setitem(os.environ, "MRLHF_DEVICE", "rehearsing")
    with pytest.raises(EnvironmentProblem, match="'rehearsing'"):
        device.current()
    device.current.cache_clear()


def test_wrong_devices_and_dtypes_raise(result: dict[str, Any]) -> None:
    mismatch, wrong = "FakeTensorDeviceMismatchError", "RuntimeError"
    assert result["refused"] == {
        "devices": mismatch,
        "dtypes": wrong,
        "module left on the host": mismatch,
        "module moved": "",
        "norm of two dtypes": wrong,
        "shapes": wrong,
    }


def test_every_wait_of_the_host_counts_once_and_nothing_else_does(result: dict[str, Any]) -> None:
    none = {"to, not blocking", "index by numbers", "write by a mask", "to the device"}
    two = {"tensor of two numbers"}
    counted = result["waits"]
    assert len(counted) == 20 and counted == {name: 0 if name in none else 2 if name in two else 1 for name in counted}


def test_values_of_small_host_tensors_are_right(result: dict[str, Any]) -> None:
    assert result["values"] == {
        "lengths": [2, 13],
        "cumulated": [2, 15],
        "kept": 5,
        "selected": 3,
        "indexed": 3,
        "beside a loss": [1, 20],  # the loss is not known, the count is 5 on each of 4 ranks
        "summed": 20,
        "largest": 5,
        "gathered": [2, 13] * 4,
        "chosen equally often": [3, 3, 3, 3],
        "unknown": [1, 1],
        "of a copy": [2, 13],
    }


def test_bytes_that_live(result: dict[str, Any]) -> None:
    assert result["memory"] == {
        "a": [8 * MIB, {"weights": 4 * MIB, "other": 4 * MIB}],  # the sum is dropped at once
        "b": 4 * MIB + 3 * 512,  # a view has no bytes, an allocation takes multiples of 512
        "parked": [4 * MIB, 2 * 512, 4 * MIB + 2 * 512],
        "free": 4 * MIB + 2 * 512,
        "views": 10,
        "copies": [[["c", "cuda->cpu"], 4 * MIB], [["c", "cpu->cuda"], 4 * MIB]],
    }


def test_products(result: dict[str, Any]) -> None:
    assert result["flops"] == {
        "product": 3 * 2 * 3 * 5 * 7,
        "attention": 2 * 2 * (2 * 3 // 2 + 4 * 5 // 2) * 2 * 8,  # two products over the pairs, 2 heads of size 8
    }


def test_square_tensors(result: dict[str, Any]) -> None:
    [what] = result["squares"]  # not its view, not [60, 49]
    assert what.startswith("aten::bmm (2, 60, 60) at ") and what.endswith("rehearsal_program.py:squares")


def test_attention_and_norms_keep_what_cuda_kernels_keep(result: dict[str, Any]) -> None:
    half, number = 2, 4
    assert result["fused_kernels"] == {
        "attention": 4 * 64 * 16 * half + 4 * 64 * number + 2 * 512,  # output, log-sum-exp, random state
        "norm": 4 * 64 * 16 * half + 4 * 64 * number + 512,  # output, one number a row, the weight
    }


def test_messages_of_two_ranks_must_pair(result: dict[str, Any]) -> None:
    paired = result["paired"]
    assert paired.pop("same") == [] and paired.pop("splits") == []
    assert {name: len(problems) for name, problems in paired.items()} == {
        "order": 1, "sizes": 1, "missing": 1, "lonely_send": 1, "short_receive": 1, "wrong_splits": 1,
    }  # fmt: skip
    assert "call 0: ('allreduce', 16) against ('allreduce', 20)" in paired["sizes"][0]
    assert "sends of rank 0 to rank 1" in paired["lonely_send"][0]
