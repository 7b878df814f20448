from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.data.pack import pack
from mrlhf.errors import DataError


def reference_rooms(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing written naively: the room left in every pack."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_sample_once_no_pack_too_full_and_equal_to_naive_best_fit(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 80))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    packs = pack(lengths, capacity=capacity)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(members == sorted(members) and members for members in packs)
    assert sorted(capacity - sum(lengths[i] for i in members) for members in packs) == reference_rooms(
        lengths, capacity
    )
    assert pack(np.asarray(lengths, dtype=np.int32), capacity=capacity) == packs


def test_fill_at_scale() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.9, 200_000), 1, 8192).astype(int)
    packs = pack(lengths, capacity=8192)
    assert lengths.sum() / (8192 * len(packs)) > 0.999


@pytest.mark.parametrize("bad", [0, -3, 11])
def test_length_that_does_not_fit_is_an_error(bad: int) -> None:
    with pytest.raises(DataError, match=f"item 2 has {bad} tokens"):
        pack([5, 10, bad], capacity=10)
