"""Optimizer state goes from each of Megatron's optimizers to each, by parameter name."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from conftest import TESTS, make_hf_model, python

from mrlhf.checkpoint.optimizer_state import split_name, translate
from mrlhf.errors import CheckpointError

WIDE, NARROW = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def resumed(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = TESTS / "checkpoint/optimizer_program.py"
    mixed = tmp_path_factory.mktemp("mixed")
    make_hf_model(mixed, "deepseek_v3", vocab_size=323, num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world / "qwen2" / name, mixed / name)
    args = (world / "qwen2", world / "qwen3_moe", mixed, world / "sft", tmp_path_factory.mktemp("optimizers"))
    done = python(program, *args, ranks=2)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("model", ["dense float32", "dense bfloat16", "moe float32", "mixed float32"])
def test_every_optimizer_reads_the_state_of_every_other(resumed: dict[str, Any], model: str) -> None:
    """Distributed or not, experts over ranks or not. Both moments and the step count enter the second step's loss."""
    for writer, readers in resumed[model].items():
        assert bool(readers.pop("former names")) == writer.endswith("before"), "they are written no more, but read"
        unbroken = readers.pop("unbroken")
        assert len(readers) >= 2
        for reader, steps in readers.items():
            for ours, theirs in zip(steps, unbroken, strict=True):
                what = f"{writer} read by {reader}"
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), what
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), what
                assert ours["lr"] == theirs["lr"], what


def test_a_run_that_goes_on_in_float32_takes_the_masters_and_its_own_options(resumed: dict[str, Any]) -> None:
    """Before, the weights stayed rounded on the ranks that do not own them, and lr and betas were the file's."""
    for writer in ("dp2", "dp2 whole"):
        one, other = (resumed[f"{writer} as float32 {reader}"] for reader in ("dp2", "dp2 whole"))
        assert one == other
        assert one["more than bfloat16"] and one["rounds to it"]
        assert one["groups"] == [[0.9, 5e-4, 2]] * 2


def test_names() -> None:
    assert split_name("optimizer.state.exp_avg.decoder.a.weight") == ("exp_avg", "decoder.a.weight")
    assert split_name("chained_1.optimizer.state.fp32_param.a") == ("param", "a")
    assert split_name("decoder.optimizer.state.a") is None
    dense = {"a": NARROW, "optimizer.state.fp32_param.a": WIDE, "optimizer.state.exp_avg.a": WIDE}
    spread = {f"chained_0.{name}" if "." in name else name: dtype for name, dtype in dense.items()}
    wanted = [("a", NARROW), ("optimizer.state.param.a", WIDE), ("chained_1.optimizer.state.exp_avg.a", WIDE)]
    for stored in (dense, spread):
        assert translate(wanted, stored, where="here") == list(stored)
        assert translate([("a", WIDE)], stored, where="here") == [list(stored)[1]], "the master, not the rounded weight"
    plain = {"a": WIDE, "optimizer.state.exp_avg.a": WIDE}
    assert translate(wanted, plain, where="here") == ["a", "a", "optimizer.state.exp_avg.a"]
    assert translate([("a", WIDE)], plain, where="here") == ["a"]


def test_missing_state_is_named() -> None:
    stored = {name: NARROW for name in "abcde"} | {"optimizer.state.exp_avg.a": WIDE}
    wanted = [(f"optimizer.state.{kind}.{name}", WIDE) for name in "abcde" for kind in ("param", "exp_avg")]
    with pytest.raises(CheckpointError, match=r"no optimizer state of a \(param\), b \(param\).*and 6 more") as error:
        translate(wanted, stored, where="RUN/step_1")
    assert error.value.where == "RUN/step_1" and error.value.fix
