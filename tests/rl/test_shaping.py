from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.rl.shaping import RunningStd, equal_groups, informative_groups, overlong_penalty, scale_scores, settle_groups


def naive_overlong(length: int, limit: int, buffer: int, factor: float) -> float:
    """DAPO eq. 13 as it is printed."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return factor * ((limit - buffer) - length) / buffer
    return -factor


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 60), st.floats(0, 3))
def test_overlong_penalty_equals_the_paper(data: st.DataObject, limit: int, factor: float) -> None:
    buffer = data.draw(st.integers(1, limit))
    lengths = data.draw(st.lists(st.integers(1, limit + 5), min_size=1, max_size=8))
    found = overlong_penalty(torch.tensor(lengths), limit=limit, buffer=buffer, factor=factor)
    expected = [naive_overlong(length, limit, buffer, factor) for length in lengths]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_overlong_penalty_refuses_what_makes_no_sense() -> None:
    for buffer in (0, 11):
        with pytest.raises(ConfigError, match="overlong buffer"):
            overlong_penalty(torch.tensor([5]), limit=10, buffer=buffer, factor=1.0)


def test_informative_groups() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.1, 0.1, 0.1])
    assert informative_groups(scores, group_size=3).tolist() == [False, True, False]


def test_groups_that_the_clip_makes_equal_are_not_informative() -> None:
    scores = torch.tensor([1e30, 2e30, 11.0, 9.0])
    assert informative_groups(scores, group_size=2).tolist() == [True, True]
    assert informative_groups(scores, group_size=2, clip=10.0).tolist() == [False, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_running_std_is_that_of_all_scores_together(rollouts: list[list[float]]) -> None:
    running, seen = RunningStd(), []
    for scores in rollouts:
        seen += scores
        mean = math.fsum(seen) / len(seen)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in seen) / len(seen))
        divisor = running.update(torch.tensor(scores))
        if std < 1e-7:  # equal scores have no scale
            assert divisor == 1.0
        elif std > 1e-4:
            assert divisor == pytest.approx(std, rel=1e-4)
        again = RunningStd()
        again.load_state_dict(running.state_dict())
        running = again


def test_scalings() -> None:
    scores, running = torch.tensor([1.0, 3.0]), RunningStd()
    assert scale_scores(scores, scaling="none", running=running).tolist() == [1, 3]
    assert scale_scores(scores, scaling="whiten", running=running).tolist() == [-1, 1]
    assert scale_scores(2 * scores, scaling="std", running=running).tolist() == [1, 3]
    assert running.count == 0
    assert scale_scores(2 * scores, scaling="running_std", running=running).tolist() == [1, 3]
    assert running.count == 2
    assert scale_scores(torch.full((4,), 0.1), scaling="whiten", running=running).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="scaling"):
        scale_scores(scores, scaling="both", running=running)
    with pytest.raises(CheckpointError, match="running statistics"):
        running.load_state_dict({})


@pytest.mark.parametrize("scaling", ["std", "running_std"])
def test_equal_scores_are_not_divided_by_their_rounding(scaling: str) -> None:
    for scores in ([-5.0] * 4, [0.3, 0.1 + 0.2, 0.3, 0.30000001], [1e6, 1e6 + 0.06, 1e6, 1e6], [1e-7, 0.0, 0.0, -1e-7]):
        x = torch.tensor(scores)
        assert torch.equal(scale_scores(x, scaling=scaling, running=RunningStd()), x)


@pytest.mark.parametrize("scaling", ["whiten", "std", "running_std"])
def test_no_scaling_sets_equal_scores_of_a_group_apart(scaling: str) -> None:
    """Whitening takes the mean away that the tolerance is relative to, and a small std enlarges what differs."""
    scores = torch.tensor([0.9, 0.9 + 6e-8, 0.92, 0.92, 0.9, 0.94])
    assert scores[0] != scores[1]
    settled = settle_groups(scores, group_size=2)
    assert settled.tolist() == pytest.approx(scores.tolist(), abs=1e-7)
    scaled = scale_scores(settled, scaling=scaling, running=RunningStd())
    assert equal_groups(scaled, group_size=2).tolist() == [True, True, False]
    assert scaled[0] == scaled[1]
