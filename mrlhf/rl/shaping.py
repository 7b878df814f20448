"""Score shaping before token rewards: overlong penalty, scaling, and the test for groups without signal.

Letters: B answers, G groups of N answers to one prompt. Everything is fp32; all but `RunningStd` are pure functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.losses import check_choice

SCALINGS = ("none", "whiten", "std", "running_std")
VARIANCE_FLOOR = 1e-8
EQUAL_TOLERANCE = 1e-6  # the default of reward.equal_tolerance: above the rounding of fp32 sums


def overlong_penalty(lengths_B: Tensor, *, limit: int, buffer: int, factor: float) -> Tensor:
    """-factor clip((length - (limit - buffer)) / buffer, 0, 1), [B] (DAPO's overlong punishment, Yu 2025, eq. 13).

    lengths_B [B]: tokens of each answer. Raises ConfigError unless 0 < buffer <= limit and factor >= 0.
    """
    if not 0 < buffer <= limit:
        what = f"overlong buffer = {buffer} tokens with answers of at most {limit}"
        raise ConfigError(what, expected=f"1 to {limit}")
    if not factor >= 0:
        raise ConfigError(f"overlong penalty = {factor}", expected="a number >= 0")
    beyond_B = (lengths_B.float() - (limit - buffer)) / buffer
    return -factor * beyond_B.clamp(0.0, 1.0)


def equal_groups(scores_B: Tensor, *, group_size: int, tolerance: float = EQUAL_TOLERANCE) -> Tensor:
    """bool [G]: whether the scores of a group are equal: max - min <= tolerance x max(1, largest |score|).

    What differs by less is rounding, which a division by the group's std would turn into advantages of order 1.
    """
    scores_GN = scores_B.double().view(-1, group_size)
    return scores_GN.amax(1) - scores_GN.amin(1) <= tolerance * scores_GN.abs().amax(1).clamp(min=1.0)


def informative_groups(scores_B: Tensor, *, group_size: int, tolerance: float = EQUAL_TOLERANCE,
                       clip: float = math.inf) -> Tensor:
    """bool [G]: whether the scores of a group, clipped to +-clip, differ. Equal scores give advantages of 0 with every
    group estimator: DAPO's dynamic sampling (Yu 2025) drops such groups.
    """
    return ~equal_groups(scores_B.clamp(-clip, clip), group_size=group_size, tolerance=tolerance)


def settle_groups(scores_B: Tensor, *, group_size: int, tolerance: float = EQUAL_TOLERANCE) -> Tensor:
    """The scores [B]; those of a group of equal scores are its mean, so that no scaling sets them apart."""
    scores_GN = scores_B.view(-1, group_size)
    equal_G = equal_groups(scores_B, group_size=group_size, tolerance=tolerance)
    mean_G1 = scores_GN.double().mean(1, keepdim=True).to(scores_B.dtype)
    return torch.where(equal_G[:, None], mean_G1, scores_GN).flatten()


def is_rounding(std: Tensor, mean: Tensor) -> Tensor:
    """bool: whether numbers of this mean and standard deviation are all the same but for fp32 rounding, of them or of
    terms of order 1 that cancel.
    """
    return std <= EQUAL_TOLERANCE * mean.abs().clamp(min=1.0)


class RunningStd:
    """Biased standard deviation of all scores so far, over all rollouts, by Welford's parallel update (Chan 1979).

    The checkpoint keeps its state.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores_B: Tensor) -> float:
        """Adds scores_B [B] and returns the number to divide by, see `scale_scores`."""
        x = scores_B.double()
        n, mean = x.numel(), float(x.mean())
        squares, delta, total = float((x - mean).square().sum()), mean - self.mean, self.count + n
        self.squares += squares + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        std = torch.tensor(math.sqrt(self.squares / total), dtype=torch.float64)
        return float(_divisor(std, torch.tensor(self.mean, dtype=torch.float64)))

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises CheckpointError unless a RunningStd wrote the state."""
        if set(state) != {"count", "mean", "squares"}:
            what = "the checkpoint holds no running statistics of the scores"
            raise CheckpointError(what, fix="resume with the reward.scaling it was trained with")
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def scale_scores(scores_B: Tensor, *, scaling: str, running: RunningStd) -> Tensor:
    """[B]. none: r. whiten: (r - mean) / std. std: r / std. running_std: r / std of all rollouts so far.

    Mean and biased std run over scores_B, or over all scores that `running` has seen; a std is at least 1e-4. Scores
    that differ by rounding alone whiten to 0; they have no scale to divide by. Raises ConfigError for an unknown
    scaling.
    """
    check_choice("scaling", scaling, SCALINGS)
    if scaling == "none":
        return scores_B.float()
    if scaling == "running_std":
        return (scores_B.double() / running.update(scores_B)).float()
    x = scores_B.double()
    std, mean = x.std(unbiased=False), x.mean()
    if scaling == "whiten":
        x = (x - mean).masked_fill(is_rounding(std, mean), 0.0)
    return (x / _divisor(std, mean)).float()


def _divisor(std: Tensor, mean: Tensor) -> Tensor:
    return std.clamp(min=VARIANCE_FLOOR**0.5).masked_fill(is_rounding(std, mean), 1.0)
