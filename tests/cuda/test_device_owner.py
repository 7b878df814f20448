"""Trainer and vLLM on one card of 8, on fake tensors: whose turn it is, and that a plan of what is free fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import TESTS, python

from mrlhf.memory.vllm_budget import RESERVE


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    done = python(TESTS / "cuda/device_owner_program.py", device="rehearsal")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def test_vllm_and_the_trainers_parts_take_turns(cases: dict[str, Any]) -> None:
    turns = cases["parked"]["turns"]
    assert [t["turn"] for t in turns] == ["start", *["generate", "update", "written", "save"] * 2]
    for turn in turns:
        away = {role: all(parts) for role, parts in turn["parked"].items()}
        if turn["awake"]:
            assert all(away.values()), turn
        assert turn["awake"] == (turn["turn"] in ("generate", "written")), turn
        if turn["turn"] == "update":
            assert not away["actor"] and away["critic"] and away["reference"]
        if turn["turn"] == "save":
            assert not away["actor"] and not away["critic"] and away["reference"]


@pytest.mark.parametrize("name", ["parked", "resident", "always awake"])
def test_the_plan_fits_in_every_phase(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    plan, card = case["plan"], case["plan"]["total"]
    usable = (1 - RESERVE) * card
    assert plan["cache"] > 30 and plan["weights"] + plan["work"] + plan["libraries"] + plan["cache"] < plan["free"]
    largest = max(case["peaks"].values())
    assert largest < usable + 0.1, f"{largest:.2f} GiB of a card of {card:.2f}"
    generating = [t["live"] for t in case["turns"] if t["turn"] == "generate"]
    if name != "always awake":
        # the critic of the "resident" case has made no moments yet, whose room is kept
        missing = 0 if name == "parked" else case["left"][1] / 2**30
        assert usable - 0.1 < generating[-1] + missing, "and little is left unused"


def test_adams_moments_are_counted_before_they_exist(cases: dict[str, Any]) -> None:
    for case in cases.values():
        before, after = case["moments"]
        assert before == after > 4e9 and case["left"][0] == 0 < case["left"][1], "the actor has stepped, the critic not"
    resident = cases["resident"]
    first, second = (t["live"] for t in resident["turns"] if t["turn"] == "generate")
    gather_buffer = 4096 * 4096 * 2  # of sequence parallelism, from the first step on
    grown = (resident["moments"][0] - resident["left"][1] + gather_buffer) / 2**30
    assert second - first == pytest.approx(grown, rel=0.001)
