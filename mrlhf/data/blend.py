"""Several data sets seen as one: samples and rows are numbered through them, one source after the other.

Nothing is copied: a sample is read from its own source. order.py decides which row comes when.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mrlhf.errors import DataError

IndexedSample = tuple[int, np.ndarray, np.ndarray]  # index, tokens int64 [T], mask uint8 [T]


class Dataset(Protocol):
    """What a loader needs from a data set.

    A row is a pack, or with `packing` false a sample (a pair for preference data).
    """

    prefix: str
    task: str
    meta: dict[str, Any]
    num_samples: int
    num_packs: int
    num_tokens: int
    max_length: int  # of a sample

    @property
    def identity(self) -> str: ...  # changes when any token changes

    def sample(self, i: int) -> IndexedSample: ...
    def pack(self, row: int) -> list[IndexedSample]: ...
    def row_lengths(self, row: int, *, packing: bool) -> list[int]: ...  # tokens of the samples of a row
    def longest_row(self, *, packing: bool) -> list[int]: ...  # its samples' lengths; padded: all as the longest sample
    def margin(self, pair_index: int) -> float | None: ...
    def label(self, i: int) -> Any: ...


def rows_of(data: Dataset, *, packing: bool) -> int:
    """Rows of one data set."""
    return data.num_packs if packing else data.num_samples // (2 if data.task == "preference" else 1)


def sources_of(data: Dataset) -> list[Dataset]:
    """The parts of a blend; a plain data set is its only one."""
    return data.sources if isinstance(data, Blend) else [data]


def sample_places(data: Dataset, indices: Sequence[int], *, most: int = 20) -> str:
    """The places of samples, for a message: `sample(s) 3, 17 of data/chat and sample(s) 5 of data/code`."""
    numbers_of: dict[str, list[int]] = {}
    for i in sorted(indices)[:most]:
        prefix, inside = data.located(i) if isinstance(data, Blend) else (data.prefix, i)
        numbers_of.setdefault(prefix, []).append(inside)
    text = " and ".join(f"sample(s) {', '.join(map(str, ns))} of {prefix}" for prefix, ns in numbers_of.items())
    return text + (f" and {len(indices) - most} more" if len(indices) > most else "")


def names_of(prefixes: Sequence[str]) -> list[str]:
    """Short names for logs: the last part of the prefix, or the whole prefix where that is not unique."""
    short = [os.path.basename(p) for p in prefixes]
    count = Counter(short)
    return [s if count[s] == 1 else p for s, p in zip(short, prefixes, strict=True)]


class Blend:
    """Two or more data sets that fit together (see `mismatches`), as one Dataset."""

    def __init__(self, sources: Sequence[Dataset], *, loss_weights: Sequence[float] | None = None) -> None:
        """loss_weights: what a token of each source counts in the loss; default 1."""
        self.sources = list(sources)
        self.loss_weights = [1.0] * len(self.sources) if loss_weights is None else list(loss_weights)
        self.prefix = " + ".join(s.prefix for s in sources)
        self.task = sources[0].task
        self.meta = sources[0].meta  # all sources agree in what is read from it
        self._samples = np.cumsum([0, *(s.num_samples for s in sources)]).tolist()
        self._packs = np.cumsum([0, *(s.num_packs for s in sources)]).tolist()
        self.num_samples, self.num_packs = self._samples[-1], self._packs[-1]
        self.num_tokens = sum(s.num_tokens for s in sources)
        self.max_length = max(s.max_length for s in sources)

    @property
    def identity(self) -> str:
        return hashlib.sha256("".join(s.identity for s in self.sources).encode()).hexdigest()

    def _find(self, starts: list[int], i: int) -> tuple[Dataset, int, int]:
        """The source of sample or pack i, i inside it, and the source's first sample."""
        s = bisect_right(starts, i) - 1
        return self.sources[s], i - starts[s], self._samples[s]

    def sample(self, i: int) -> IndexedSample:
        source, inside, _ = self._find(self._samples, i)
        _, tokens, mask = source.sample(inside)
        return i, tokens, mask

    def pack(self, row: int) -> list[IndexedSample]:
        source, inside, first = self._find(self._packs, row)
        return [(first + i, tokens, mask) for i, tokens, mask in source.pack(inside)]

    def located(self, i: int) -> tuple[str, int]:
        """The prefix of sample i's source, and its number there."""
        source, inside, _ = self._find(self._samples, i)
        return source.prefix, inside

    def loss_weight(self, i: int) -> float:
        """What a token of sample i counts in the loss."""
        return self.loss_weights[bisect_right(self._samples, i) - 1]

    def row_lengths(self, row: int, *, packing: bool) -> list[int]:
        group = 1 if packing or self.task != "preference" else 2
        starts = self._packs if packing else [first // group for first in self._samples]
        source, inside, _ = self._find(starts, row)
        return source.row_lengths(inside, packing=packing)

    def longest_row(self, *, packing: bool) -> list[int]:
        return max((s.longest_row(packing=packing) for s in self.sources), key=sum)

    def margin(self, pair_index: int) -> float | None:
        source, inside, _ = self._find(self._samples, 2 * pair_index)
        return source.margin(inside // 2)

    def label(self, i: int) -> Any:
        source, inside, _ = self._find(self._samples, i)
        return source.label(inside)


def mismatches(sources: Sequence[Dataset], *, key: str) -> list[DataError]:
    """One error for each property in which a source differs from the first and must not; it names both sides."""
    compared: tuple[tuple[str, Callable[[Dataset], Any], Callable[[Dataset], Any], str | None], ...] = (
        ("task", lambda d: d.task, lambda d: d.task, None),
        ("seq_length", lambda d: d.meta["seq_length"], lambda d: d.meta["seq_length"],
         "one --seq-length for all of them"),
        ("tokenizer", lambda d: d.meta["tokenizer_fingerprint"], _tokenizer, "one --tokenizer for all of them"),
        ("margins", _has_margins, _has_margins, "a margin in every source or in none")
    )
    first, errors = sources[0], []
    for other in sources[1:]:
        for what, value, shown, fix in compared:
            if None not in (value(first), value(other)) and value(first) != value(other):
                sides = f"{first.prefix} has {shown(first)}, {other.prefix} has {shown(other)}"
                text = f"the sources differ in {what}: {sides}"
                errors.append(DataError(text, where=key, expected="sources that were made alike", fix=fix))
    return errors


def _tokenizer(data: Dataset) -> str:
    return f"{data.meta['tokenizer']} (fingerprint {data.meta['tokenizer_fingerprint'][:12]})"


def _has_margins(data: Dataset) -> str | None:
    """None for data that cannot have margins."""
    return None if data.task != "preference" else "none" if data.margin(0) is None else "margins"
