"""Loss spikes: a loss far above those of the steps before it, against their median and their median absolute deviation (MAD).

Both ignore what a few steps do, so that a spike neither hides the next one nor raises the bar for it; a level that stays becomes the
new normal within half a window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

WINDOW = 50  # steps looked back on
LEAST = 20  # before so many there is no judgement
_SMALLEST = 0.01  # of the median: a loss that hardly moves has a MAD near 0, and every flicker would be a spike


def normal(history: Sequence[float]) -> tuple[float, float]:
    """(median, robust standard deviation) of some losses: 1.4826 x MAD, which is that of a normal distribution, at least 1 % of the median."""
    centre = median(history)
    return centre, max(1.4826 * median(abs(x - centre) for x in history), _SMALLEST * abs(centre))


def deviations(history: Sequence[float], loss: float) -> float:
    """How many robust standard deviations `loss` lies above the median of `history`; 0 with fewer than LEAST values in it."""
    if len(history) < LEAST:
        return 0.0
    centre, scale = normal(history)
    return (loss - centre) / scale if scale else math.inf if loss > centre else 0.0


class SpikeDetector:
    """Judges each step's loss by the WINDOW ones before it. `recent` is what a checkpoint keeps of it."""

    def __init__(self, threshold: float, recent: Iterable[float] = ()) -> None:
        self.threshold, self._recent = threshold, deque(recent, maxlen=WINDOW)

    @property
    def recent(self) -> list[float]:
        return list(self._recent)

    def meet(self, loss: float) -> str | None:
        """Takes one step's loss in. What is wrong with it, or None; a loss that is not finite is another matter and is passed over."""
        if not math.isfinite(loss):
            return None
        history = self.recent
        self._recent.append(loss)
        above = deviations(history, loss)
        if not above > self.threshold:
            return None
        return f"{loss:.4f}, {above:.1f} robust deviations above the median {normal(history)[0]:.4f} of the last {len(history)} steps"
