"""Packing: exact best-fit-decreasing over a histogram of lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mrlhf.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, *, capacity: int) -> list[list[int]]:
    """Indices of `lengths` (tokens a sample) grouped so that no group's total exceeds `capacity` (tokens a pack).

    Best-fit-decreasing: longest first, each into the fullest open pack that still has room. Equal lengths come in the
    order of their indices, so the result depends on the arguments alone; inside a pack the indices ascend.
    Cost: O(n + d * capacity) for d distinct lengths, the second term a vectorised scan that stops at its first hit.
    Raises DataError for a length that is not in 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if wrong.size:
        example = f"item {wrong[0]} has {sizes[wrong[0]]} tokens"
        raise DataError(f"{wrong.size} of {sizes.size} lengths do not fit in a pack; first: {example}",
                        expected=f"1 to {capacity} tokens", fix="a larger --seq-length, or --truncate drop")

    order = np.argsort(-sizes, kind="stable")
    distinct, starts = np.unique(-sizes[order], return_index=True)
    items: list[int] = order.tolist()
    ends = [*starts[1:].tolist(), len(items)]

    packs: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room[r]: open packs with exactly r tokens left
    open_at = np.zeros(capacity + 1, dtype=bool)  # open_at[r]: room[r] is not empty

    for size, begin, end in zip((-distinct).tolist(), starts.tolist(), ends, strict=True):
        # A pack stays the fullest one that fits for as long as it has room, so it takes all it can hold at once.
        while begin < end:
            left = size + int(np.argmax(open_at[size:]))
            if not open_at[left]:
                break
            waiting = room[left]
            while waiting and begin < end:
                index = waiting.pop()
                stop = min(end, begin + left // size)
                packs[index].extend(items[begin:stop])
                after = left - (stop - begin) * size
                room[after].append(index)
                open_at[after] = True
                begin = stop
            open_at[left] = bool(waiting)
        each = capacity // size
        for first in range(begin, end, each):
            new = items[first : min(end, first + each)]
            after = capacity - len(new) * size
            room[after].append(len(packs))
            open_at[after] = True
            packs.append(new)

    for members in packs:
        members.sort()
    return packs
