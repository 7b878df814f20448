"""The order of rows in a run over several sources: a pure function of (seed, position), equal for any number of ranks.

It has two parts and no index of all rows:

`Interleave`  which source the row at position p comes from. With integer shares c_s (N = sum c_s), row k of source s
              has the release floor(k N / c_s) and the deadline ceil((k + 1) N / c_s); among the released rows the one
              with the earliest deadline is taken. Unit jobs whose shares sum to one always meet their deadlines this
              way, so after p rows source s has given floor(c_s p / N) or ceil(c_s p / N) of them: less than one row
              off its share at every position, and exactly c_s rows every N. (Taking the source that is most behind, as
              Megatron does, exceeds one row with five sources or more; so do the divisor methods, which would give the
              source of any position directly.)
`permute`     the row within an epoch of a source: a drawn permutation up to a million rows, above that a keyed
              bijection computed on the fly.

Cost: start O(sources) for any number of rows; a row O(sources) in plain Python (one or two microseconds); memory at
most 4 MB a source. A run that resumes at position p takes the counts from its checkpoint and checks them against the
bound above; without them it counts from the start of the current cycle of N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

_ROUNDS = 6
_LISTED = 1 << 20  # rows up to which a permutation is drawn and kept (4 MB)


@dataclass(frozen=True)
class Mix:
    """`rows` that each source has, its integer share `counts`, and the rows of one pass over the whole."""

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    pass_rows: int

    @classmethod
    def single(cls, rows: int) -> Mix:
        return cls((rows,), (1,), rows)

    @classmethod
    def from_weights(cls, rows: Sequence[int], weights: Sequence[float | None], epochs: Sequence[float | None]) -> Mix:
        """Without weights, a pass takes epochs (default 1) x rows from every source, exactly.

        Weights are the shares of the rows. A pass then ends when the first source that has `epochs` has been passed
        that often; where none has, after as many rows as all sources have together. Give weights for all sources or for
        none.
        """
        if all(w is None for w in weights):
            counts = tuple(max(1, round(n * _exact(e))) for n, e in zip(rows, epochs, strict=True))
            return cls(tuple(rows), counts, sum(counts))
        shares = [_exact(w) for w in weights]
        scale = math.lcm(*(s.denominator for s in shares))
        limits = [
            n * _exact(e) * sum(shares) / s for n, e, s in zip(rows, epochs, shares, strict=True) if e is not None
        ]
        total = math.floor(min(limits)) if limits else sum(rows)
        return cls(tuple(rows), tuple(int(s * scale) for s in shares), max(1, total))


def _exact(number: float | None) -> Fraction:
    """The decimal number as written: 0.1 is one tenth. None: 1."""
    return Fraction(1) if number is None else Fraction(str(number))


class Interleave:
    """The sources of position 0, 1, 2, ... (see the module). Keeps the counts at one position and continues there."""

    def __init__(self, counts: Sequence[int]) -> None:
        common = math.gcd(*counts)
        self.counts = [c // common for c in counts]
        self.total = sum(self.counts)
        self._start(0, [0] * len(self.counts))

    def _start(self, position: int, taken: list[int]) -> None:
        self.position, self.taken = position, taken
        windows = [self._window(s, k) for s, k in enumerate(taken)]
        self._release, self._deadline = [w[0] for w in windows], [w[1] for w in windows]

    def _window(self, source: int, k: int) -> tuple[int, int]:
        """First position that row k of a source may have, and the one it must stand before."""
        c = self.counts[source]
        return k * self.total // c, -(-(k + 1) * self.total // c)

    def bounds(self, position: int) -> list[tuple[int, int]]:
        """Least and largest count of each source after `position` rows."""
        return [(c * position // self.total, -(-c * position // self.total)) for c in self.counts]

    def seek(self, position: int, taken: Sequence[int] | None = None) -> None:
        """Go to `position`. `taken`: the counts there, where they are known; ValueError where they cannot be."""
        if position == self.position:
            return
        if taken is not None:
            fits = len(taken) == len(self.counts) and sum(taken) == position
            bounds = self.bounds(position)
            if not fits or not all(low <= t <= high for t, (low, high) in zip(taken, bounds, strict=True)):
                raise ValueError(f"counts {list(taken)} at position {position:,}")
            self._start(position, list(taken))
            return
        cycle = position // self.total
        if position < self.position or cycle != self.position // self.total:
            self._start(cycle * self.total, [cycle * c for c in self.counts])
        self.take(position - self.position)

    def take(self, n: int) -> np.ndarray:
        """Sources of the next n positions: int64 [n]."""
        release, deadline, sources = self._release, self._deadline, range(len(self.counts))
        chosen = np.empty(n, np.int64)
        for i in range(n):
            position, best, soonest = self.position + i, -1, math.inf
            for s in sources:
                if deadline[s] < soonest and release[s] <= position:
                    best, soonest = s, deadline[s]
            chosen[i] = best
            self.taken[best] += 1
            release[best], deadline[best] = self._window(best, self.taken[best])
        self.position += n
        return chosen


@lru_cache(maxsize=64)
def _listed(n: int, seed: int, source: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, (source << 32) + epoch])).permutation(n).astype(np.int32)


def permute(at: np.ndarray, n: int, *, seed: int, source: int, epoch: int) -> np.ndarray:
    """Where each of `at` (in [0, n)) goes under this epoch's permutation of [0, n): int64, the shape of `at`."""
    if n <= _LISTED:
        return _listed(n, seed, source, epoch)[at].astype(np.int64)
    return feistel(at, n, np.random.SeedSequence([seed, source, epoch]).generate_state(_ROUNDS, np.uint64))


def feistel(at: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, n) without a list: Feistel rounds on the next even number of bits, repeated while outside.

    Expected work: at most four passes of the rounds over `at`.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    result = at.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        value = result[todo]
        left, right = value >> half, value & low
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & low)
        result[todo] = value = left << half | right
        todo = todo[value >= n]
    return result.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """Rows of step 1, 2, ..., `total_steps`: a step is a slice of the order; -1 fills the last one up.

    Rows are numbered through all sources, one source after the other. No row of a source repeats within an epoch. Every
    epoch of every source has its own permutation (`shuffle`), or the order of the source.
    """

    def __init__(self, mix: Mix, *, global_batch_size: int, num_epochs: float, max_steps: int | None, seed: int,
                 shuffle: bool) -> None:
        self.mix, self.batch, self.seed, self.shuffle = mix, global_batch_size, seed, shuffle
        self.total_rows = max(1, round(mix.pass_rows * num_epochs))
        self.total_steps = math.ceil(self.total_rows / global_batch_size)
        if max_steps is not None:
            self.total_rows = max(self.total_rows, max_steps * global_batch_size)
            self.total_steps = max_steps
        self._max_steps, self._step, self._row = max_steps, 0, 0
        self._first = np.concatenate([[0], np.cumsum(mix.rows)])
        self._interleave = Interleave(mix.counts)

    def position(self, step: int) -> int:
        """Rows seen after `step` steps, fillers not counted."""
        return min(self._row + (step - self._step) * self.batch, self.total_rows)

    def rows(self, step: int) -> list[int]:
        """The rows of step 1, 2, ... total_steps; -1 fills the last step."""
        rows = self.span(self.position(step - 1), self.position(step))
        return rows + [-1] * (self.batch - len(rows))

    def span(self, start: int, stop: int) -> list[int]:
        """Rows at positions start <= p < stop of the order, which has no end."""
        self._interleave.seek(start)
        before = list(self._interleave.taken)
        sources = self._interleave.take(stop - start)
        rows = np.empty(stop - start, np.int64)
        for s in np.unique(sources).tolist():
            where = np.flatnonzero(sources == s)
            rows[where] = self._first[s] + self._rows_of(s, before[s] + np.arange(len(where)))
        return rows.tolist()

    def peek(self, start: int, stop: int) -> list[int]:
        """`span` without moving the order, because going back is not free."""
        kept = self._interleave
        self._interleave = deepcopy(kept)
        try:
            return self.span(start, stop)
        finally:
            self._interleave = kept

    def _rows_of(self, source: int, nth: np.ndarray) -> np.ndarray:
        """The rows that a source gives as its nth, counted from the start of the run."""
        n = self.mix.rows[source]
        epochs, at = np.divmod(nth, n)
        if self.shuffle:
            for epoch in np.unique(epochs).tolist():
                inside = epochs == epoch
                at[inside] = permute(at[inside], n, seed=self.seed, source=source, epoch=epoch)
        return at

    def epoch(self, step: int) -> float:
        """Passes over the data after this step."""
        return self.position(step) / self.mix.pass_rows

    def consumed(self, step: int) -> list[int]:
        """Rows seen of each source after `step` steps."""
        return self.taken_at(self.position(step))

    def taken_at(self, position: int) -> list[int]:
        """Rows of each source among the first `position`."""
        self._interleave.seek(position)
        return list(self._interleave.taken)

    def approximate_counts(self, position: int) -> list[int]:
        """Rows of each source in the first `position`, exact to one row, without moving the order."""
        return [round(position * c / self._interleave.total) for c in self._interleave.counts]

    def rebase(self, step: int, position: int) -> None:
        """Let the steps after `step` continue at row `position`, whatever batch sizes came before."""
        self._step, self._row = step, position
        if self._max_steps is not None:
            self.total_rows = max(self.total_rows, position + (self._max_steps - step) * self.batch)
        else:
            self.total_steps = step + max(0, math.ceil((self.total_rows - position) / self.batch))

    def resume_after_step(self, step: int, consumed: Sequence[int] | None) -> None:
        """Resume after `step`. `consumed`: the counts there (None: count them); ValueError if they are impossible."""
        self.resume_at(self.position(step), consumed)

    def resume_at(self, position: int, taken: Sequence[int] | None) -> None:
        """Resume at `position`. `taken`: the counts there (None: count them); ValueError where they are impossible."""
        self._interleave.seek(position, taken)
