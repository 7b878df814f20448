"""Which rows stay and to which split each goes: exact deduplication, limits and weights of sources, splits by hash.

R rows in the order of the input. Everything depends on the rows and the options alone, not on how the work was divided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

SPLIT_NAMES = ("train", "valid", "test")
_BUCKET = 8 << 20  # rows deduplicated at once: about 400 MiB


def first_of_each(read_keys: Callable[[], Iterable[np.ndarray]], rows: int) -> np.ndarray:
    """bool [R]: true at the first row with each 128-bit key.

    `read_keys()` reads the keys, uint64 [r, 2] a shard, and is called once a bucket. Keys are compared bucket by bucket
    (by their leading bits), so memory stays at one bucket for any R; each bucket costs a pass over the keys.
    """
    keep = np.ones(rows, dtype=bool)
    buckets = -(-rows // _BUCKET)
    for bucket in range(buckets):
        parts, places, start = [], [], 0
        for keys in read_keys():
            mine = np.flatnonzero(keys[:, 0] % np.uint64(buckets) == bucket)
            parts.append(keys[mine])
            places.append(start + mine)
            start += len(keys)
        keys, place = np.concatenate(parts), np.concatenate(places)
        order = np.lexsort((place, keys[:, 1], keys[:, 0]))
        keys, place = keys[order], place[order]
        keep[place[1:][(keys[1:] == keys[:-1]).all(axis=1)]] = False
    return keep


def within_limits(keep: np.ndarray, sources: np.ndarray, *, limits: Sequence[int] | None,
                  weights: Sequence[float] | None, seed: int) -> Counter[str]:
    """Clear `keep` [R] where a source exceeds its limit or the share its weight allows; returns the drops by cause.

    sources  int [R], number of the source of each row
    limits   rows a source at most, its first ones; 0: no limit
    weights  shares of the sources in the rows that stay. No row is repeated: the largest set with these shares stays,
             a random subset of each source.
    """
    drops: Counter[str] = Counter()
    if limits is not None:
        for source, limit in enumerate(limits):
            places = np.flatnonzero(keep & (sources == source))
            if limit and len(places) > limit:
                keep[places[limit:]] = False
                drops["over_limit"] += len(places) - limit
    if weights is not None:
        places_of = [np.flatnonzero(keep & (sources == source)) for source in range(len(weights))]
        total = sum(weights)
        most = min(len(places) * total / w for places, w in zip(places_of, weights, strict=True) if w > 0)
        for source, (places, weight) in enumerate(zip(places_of, weights, strict=True)):
            wanted = min(len(places), int(most * weight / total + 1e-9))
            out = np.random.default_rng([seed, source]).permutation(len(places))[wanted:]
            keep[places[out]] = False
            drops["over_weight"] += len(out)
    return +drops


def split_of(split_keys: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """int [R]: the split of each row by its hash (uint64 [R]), so rows added to the input move no other row."""
    edges = np.cumsum(np.asarray(fractions) / sum(fractions))[:-1]
    return np.searchsorted(edges, split_keys.astype(np.float64) / 2.0**64, side="right")
