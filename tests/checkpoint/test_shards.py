"""Slices of flat parameters as boxes of tensors, and who writes what data-parallel ranks hold alike."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.checkpoint.shards import Shard, boxes, written


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=4), data=st.data())
def test_boxes_are_the_slice_in_its_order(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    whole, flat = torch.zeros(shape, dtype=torch.long), torch.arange(1, size + 1)
    parts, at = list(boxes(tuple(shape), start, end)), start
    for offset, lengths in parts:
        count = math.prod(lengths)
        whole[tuple(slice(o, o + n) for o, n in zip(offset, lengths, strict=True))] = flat[at : at + count].view(
            lengths
        )
        at += count
    assert at == end
    wanted = torch.where((flat > start) & (flat <= end), flat, 0)
    assert torch.equal(whole.flatten(), wanted)
    assert len(parts) <= max(1, 2 * len(shape) - 1), "a few boxes, however many rows"


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=12),
    copies=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_each_shard_is_written_once_and_the_work_is_shared(
    sizes: list[tuple[int, bool]], copies: tuple[int, int]
) -> None:
    """Of dense shards there are copies[0] equal ones, of experts' copies[1]; a slice has one."""
    kept: dict[str, int] = {}
    for kind in (False, True):
        largest = max((n for n, is_expert in sizes if is_expert == kind), default=0)
        total = sum(n for n, is_expert in sizes if is_expert == kind)
        for rank in range(copies[kind]):
            shards = [
                Shard(f"{i}.mlp.experts." if kind else f"{i}", (0,), (n,), torch.zeros(n), copies[kind], rank, False)
                for i, (n, is_expert) in enumerate(sizes)
                if is_expert == kind
            ]
            mine = written(shards)
            for shard in mine:
                kept[shard.key] = kept.get(shard.key, 0) + 1
            assert sum(s.data.numel() for s in mine) <= total / copies[kind] + largest
    # an empty tensor at the end belongs to nobody: it has no values
    assert all(count == 1 for count in kept.values())
    assert {int(key.split(".")[0]) for key in kept} >= {i for i, (n, _) in enumerate(sizes) if n}


def test_a_replica_of_another_rank_is_not_written() -> None:
    tied = Shard("embedding", (0,), (2,), torch.zeros(2), 1, None, True)
    assert written([tied]) == []
