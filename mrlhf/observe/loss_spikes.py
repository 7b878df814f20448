"""Finds loss spikes: a loss far above the median of the steps before it, in units of their median absolute deviation.

A few steps change neither the median nor the MAD, so one spike does not hide the next. A loss that stays at a new level
becomes normal within half a window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

WINDOW = 50  # steps in the history
MIN_HISTORY = 20  # with fewer steps nothing is a spike
_MIN_SCALE = 0.01  # times the median: a loss that hardly moves has a MAD near 0, and every flicker would be a spike


def median_and_scale(history: Sequence[float]) -> tuple[float, float]:
    """(median, robust standard deviation) of losses.

    The deviation is 1.4826 x MAD (the standard deviation, if the losses are normal), at least 1 % of the median.
    """
    centre = median(history)
    return centre, max(1.4826 * median(abs(x - centre) for x in history), _MIN_SCALE * abs(centre))


def deviations(history: Sequence[float], loss: float) -> float:
    """How many robust standard deviations `loss` lies above the median of `history`; 0 for fewer than MIN_HISTORY."""
    if len(history) < MIN_HISTORY:
        return 0.0
    centre, scale = median_and_scale(history)
    return (loss - centre) / scale if scale else math.inf if loss > centre else 0.0


class SpikeDetector:
    """Compares each step's loss with the WINDOW losses before it. A checkpoint keeps `recent`."""

    def __init__(self, threshold: float, recent: Iterable[float] = ()) -> None:
        self.threshold, self._recent = threshold, deque(recent, maxlen=WINDOW)

    @property
    def recent(self) -> list[float]:
        return list(self._recent)

    def check_loss(self, loss: float) -> str | None:
        """Adds one step's loss. Returns a description of the spike, or None; ignores a loss that is not finite."""
        if not math.isfinite(loss):
            return None
        history = self.recent
        self._recent.append(loss)
        above = deviations(history, loss)
        if not above > self.threshold:
            return None
        typical = f"the median {median(history):.4f} of the last {len(history)} steps"
        return f"{loss:.4f}, {above:.1f} robust deviations above {typical}"
