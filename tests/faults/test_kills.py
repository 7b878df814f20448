"""SIGKILL of a random rank at random moments, half of them inside a save: the run always goes on, and ends as the one that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from faults.runs import Run, check_equal, kill_again_and_again, ppo, sft

SEED = 7


def check(whole: Run, broken: Run, kills: int) -> None:
    whole.finish()
    hit = kill_again_and_again(broken, kills, random.Random(SEED))
    print(f"{broken.args[0]}, {broken.ranks} rank(s): killed {hit}")
    assert sum(hit.values()) >= kills - 1, "the run ended before it could be killed so often"
    check_equal(whole.directory, broken.directory)


def test_sft_on_two_ranks(world: Path, tmp_path: Path) -> None:
    args = sft(world, 14, **{"checkpoint.async_save": "true", "checkpoint.verify": "hash"})
    check(Run(tmp_path / "whole", args, ranks=2), Run(tmp_path / "broken", args, ranks=2), 3)


def test_ppo(world: Path, tmp_path: Path) -> None:
    args = ppo(world, 6)
    check(Run(tmp_path / "whole", args), Run(tmp_path / "broken", args), 2)


@pytest.mark.soak
def test_sft_many_times(world: Path, tmp_path: Path) -> None:
    args = sft(world, 80, **{"checkpoint.async_save": "true"})
    check(Run(tmp_path / "whole", args, ranks=2), Run(tmp_path / "broken", args, ranks=2), 18)


@pytest.mark.soak
def test_ppo_many_times(world: Path, tmp_path: Path) -> None:
    args = ppo(world, 40)
    check(Run(tmp_path / "whole", args, ranks=2), Run(tmp_path / "broken", args, ranks=2), 12)
