"""What happens to scores before they become rewards: the overlong penalty, scaling, and the groups that carry no signal.

Letters: B answers, N answers of one prompt (a group), G groups. Everything is fp32 and a pure function, but for `RunningStd`.
"""

from __future__ import annotations

import math

from torch import Tensor

from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.losses import check_choice

SCALINGS = ("none", "whiten", "std", "running_std")
VARIANCE_FLOOR = 1e-8


def overlong_penalty(lengths_B: Tensor, *, limit: int, buffer: int, factor: float) -> Tensor:
    """DAPO's soft punishment (Yu 2025, eq. 13), [B]: 0 up to limit - buffer tokens, then falling linearly to -factor at limit and beyond.

    lengths_B: tokens of each answer. Raises ConfigError unless 0 < buffer <= limit and factor >= 0.
    """
    if not 0 < buffer <= limit:
        raise ConfigError(f"overlong buffer = {buffer} tokens with answers of at most {limit}", expected=f"1 to {limit}")
    if not factor >= 0:
        raise ConfigError(f"overlong penalty = {factor}", expected="a number >= 0")
    beyond_B = (lengths_B.float() - (limit - buffer)) / buffer
    return -factor * beyond_B.clamp(0.0, 1.0)


def informative_groups(scores_B: Tensor, *, group_size: int) -> Tensor:
    """bool [G]: whether the group's scores differ. Of equal scores every group estimator makes advantages of 0 (DAPO's dynamic sampling)."""
    scores_GN = scores_B.view(-1, group_size)
    return (scores_GN != scores_GN[:, :1]).any(1)


class RunningStd:
    """Standard deviation (biased) of all scores so far, over all rollouts: Welford's parallel update. Kept in the checkpoint."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores_B: Tensor) -> float:
        """With these scores counted in, at least 1e-4."""
        x = scores_B.double()
        n, mean = x.numel(), float(x.mean())
        squares, delta, total = float((x - mean).square().sum()), mean - self.mean, self.count + n
        self.squares += squares + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        return math.sqrt(max(self.squares / total, VARIANCE_FLOOR))

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises CheckpointError if the state was not written by a RunningStd."""
        if set(state) != {"count", "mean", "squares"}:
            raise CheckpointError("the checkpoint holds no running statistics of the scores", fix="resume with the reward.scaling it was trained with")
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def scale_scores(scores_B: Tensor, *, scaling: str, running: RunningStd) -> Tensor:
    """[B]. none: as they are. whiten: minus their mean, by their (biased) std. std: by it alone. running_std: by that of all rollouts so far.

    A std is at least 1e-4. Raises ConfigError for another scaling.
    """
    check_choice("scaling", scaling, SCALINGS)
    if scaling == "none":
        return scores_B.float()
    if scaling == "running_std":
        return (scores_B.double() / running.update(scores_B)).float()
    x = scores_B.double()
    std = x.var(unbiased=False).clamp(min=VARIANCE_FLOOR).sqrt()
    return ((x - x.mean() if scaling == "whiten" else x) / std).float()
