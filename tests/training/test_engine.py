"""The learning-rate schedules, step by step; losses and gradients that are not finite."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TESTS, python

from mrlhf.config.options import OptimConfig
from mrlhf.errors import Problems
from mrlhf.training.optimizer import make_scheduler
from mrlhf.training.preflight import Opened


def rates(total: int, **options: object) -> list[float]:
    """lr of steps 1 .. total."""
    group = {"default_config": True, "params": [], "lr": 0.0, "weight_decay": 0.0}
    optimizer = SimpleNamespace(param_groups=[group])
    scheduler = make_scheduler(optimizer, OptimConfig(**options), total_steps=total)
    found = []
    for _ in range(total):
        scheduler.step(increment=1)
        found.append(group["lr"])
    return found


def test_warm_up_then_each_style() -> None:
    assert rates(4, lr=1.0, lr_decay_style="constant") == [1.0] * 4
    assert rates(5, lr=1.0, lr_decay_style="constant", lr_warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(4, lr=1.0, min_lr=0.5, lr_decay_style="linear") == pytest.approx([0.9, 0.8, 0.7, 0.6])
    cosine = [0.5 * (1 + math.cos(math.pi * k / 5)) for k in (1, 2, 3, 4)]
    assert rates(4, lr=1.0, lr_decay_style="cosine") == pytest.approx(cosine)
    wsd = rates(9, lr=1.0, lr_decay_style="WSD", lr_wsd_decay_steps=4, lr_warmup_steps=2)
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_keeps_its_slope(style: str) -> None:
    """A trial of 5 steps of a long configuration: step 5 is at 4 % of the peak, as in the long run."""
    trial = rates(5, lr=1.0, lr_decay_style=style, lr_warmup_steps=125)
    assert trial == pytest.approx([k / 125 for k in (1, 2, 3, 4, 5)])
    assert trial == rates(200, lr=1.0, lr_decay_style=style, lr_warmup_steps=125)[:5]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD"])
def test_what_the_checks_let_through_megatron_takes(style: str) -> None:
    """And it is the schedule as written: a rising warm-up to the peak, then never up again, not below min_lr."""
    for total, warmup, decay in product((1, 2, 5), (0, 1, 4, 5, 9), (1, 2, 5, 6)):
        written = {"lr_decay_style": style, "lr_warmup_steps": warmup, "lr_wsd_decay_steps": decay}
        optim = OptimConfig(lr=1.0, min_lr=0.5, **written)  # type: ignore[arg-type]
        opened = Opened(SimpleNamespace(optim=optim), Problems())  # type: ignore[arg-type]
        opened.check_schedule(total)
        assert bool(opened.problems.errors) == (style == "WSD" and warmup + decay > total)
        assert bool(opened.notes) == (warmup > total and style != "WSD")
        if not opened.problems.errors:
            lr = rates(total, lr=1.0, min_lr=0.5, **written)
            assert lr[:warmup] == pytest.approx([k / warmup for k in range(1, min(warmup, total) + 1)])
            assert all(0.5 <= after <= before for before, after in pairwise([1.0, *lr[warmup:]]))


def test_no_step_is_spent_at_zero_and_resume_goes_on() -> None:
    whole = rates(20, lr=1e-3, lr_decay_style="cosine", lr_warmup_steps=3)
    assert min(whole) > 0
    group = {"default_config": True, "params": [], "lr": 0.0, "weight_decay": 0.0}
    scheduler = make_scheduler(
        SimpleNamespace(param_groups=[group]), OptimConfig(lr=1e-3, lr_warmup_steps=3), total_steps=20
    )
    scheduler.step(increment=7)
    assert group["lr"] == whole[6]


@pytest.fixture(scope="module")
def nonfinite(world: Path) -> dict[str, Any]:
    done = python(TESTS / "training/nonfinite_program.py", world / "qwen2", world / "sft", ranks=2)
    assert "step skipped: not finite in the loss of sample(s) 6, 7" in done.stdout
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_what_is_not_finite_on_one_rank_touches_none(nonfinite: dict[str, Any], layout: str) -> None:
    """A loss, or only a gradient: all ranks skip, or stop, with parameters and moments as they were; and the samples
    are named.
    """
    found = nonfinite[layout]
    assert found["skipped"] == [0.0, 1.0, 1.0, 0.0] and found["loss"] == "nan"
    assert found["untouched"] == [True, True, True]
    assert found["moved"] and found["goes on"]
    assert found["worst"] == [6, 7] and found["micro-batches"] == list(range(4, 12)) and found["worst agreed"]
    assert found["limit agreed"] and "the 10th step in a row" in found["limit"]
    assert found["stop agreed"] and "not finite in the loss of sample(s) 6, 7; loss nan" in found["stop"]
    assert found["stop gradient agreed"]
    assert "in the gradient, no loss is: sample(s) 4, 5, 6, 7, 8, 9, 10, 11;" in found["stop gradient"]
