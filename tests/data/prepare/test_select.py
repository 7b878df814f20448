from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.data.prepare import select
from mrlhf.data.prepare.select import first_of_each, split_of, within_limits


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=20), min_size=1, max_size=5),
    bucket=st.integers(1, 40),
)
def test_the_first_of_equal_rows_stays(shards: list[list[tuple[int, int]]], bucket: int) -> None:
    arrays = [np.asarray(s, np.uint64).reshape(-1, 2) for s in shards]
    everything = [key for shard in shards for key in shard]
    seen: set[tuple[int, int]] = set()
    wanted = [not (key in seen or seen.add(key)) for key in everything]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_BUCKET", bucket)
        assert first_of_each(lambda: arrays, len(everything)).tolist() == wanted


def test_limits_keep_the_first_rows_of_a_source() -> None:
    keep, sources = np.ones(10, bool), np.asarray([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    keep[0] = False
    drops = within_limits(keep, sources, limits=(2, 0), weights=None, seed=1)
    assert keep.tolist() == [False, True, True, False] + [True] * 6 and drops == {"over_limit": 1}


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), data=st.data())
def test_weights_give_the_largest_mixture(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).filter(any))
    sources = np.repeat(np.arange(len(sizes)), sizes)
    keep, again = np.ones(len(sources), bool), np.ones(len(sources), bool)
    drops = within_limits(keep, sources, limits=None, weights=weights, seed=3)
    within_limits(again, sources, limits=None, weights=weights, seed=3)
    assert (keep == again).all() and drops.total() == (~keep).sum()
    counts = np.bincount(sources[keep], minlength=len(sizes))
    scale = min(n / w for n, w in zip(sizes, weights, strict=True) if w)  # rows for each unit of weight
    assert all(
        abs(count - scale * w) < 1 + 1e-6 and count <= n for count, w, n in zip(counts, weights, sizes, strict=True)
    )
    assert any(count == n for count, n, w in zip(counts, sizes, weights, strict=True) if w)


def test_splits_have_their_shares_and_are_stable() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    split = split_of(keys, (0.8, 0.15, 0.05))
    assert np.allclose(np.bincount(split) / len(keys), (0.8, 0.15, 0.05), atol=0.003)
    assert (split_of(keys[::7], (0.8, 0.15, 0.05)) == split[::7]).all()
    extremes = np.asarray([0, 2**64 - 1], np.uint64)
    assert split_of(extremes, (0.5, 0.5)).tolist() == [0, 1] and split_of(extremes, (1.0,)).tolist() == [0, 0]
