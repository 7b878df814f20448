"""Micro-batches by tokens: which rows of an optimizer step go to which data-parallel rank, and in which micro-batch.

A pure function of the rows' lengths, computed alike on every rank, so that nothing has to be sent. Rows are shared out over the ranks by
Karmarkar and Karp's largest differencing; each rank then makes micro-batches of at most so many tokens, and all ranks equally many of
them, as collectives and pipeline schedules need. A row's samples (the two answers of a pair) stay together.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from mrlhf.errors import DataError


def largest_differencing(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `costs` (each 0 or more) in `parts` groups of nearly equal sums, the greatest sum first; groups may be empty.

    Every item starts as a solution of its own: it alone, and parts - 1 empty groups. The two solutions with the largest spread (greatest
    minus least sum) are laid over each other, the greatest sum of one on the least of the other, until one is left. Its spread is at
    most the largest cost. Cost: O(n log n) and at most n x parts additions; equal input gives equal output.
    """
    Groups = list[tuple[int, list[int]]]  # (sum, indices), descending; empty groups are left out

    def spread(groups: Groups) -> int:
        return groups[0][0] - (groups[-1][0] if len(groups) == parts else 0)

    solutions: list[tuple[int, int, Groups]] = [(-cost, i, [(cost, [i])]) for i, cost in enumerate(costs)]
    if parts == 1:
        return [list(range(len(costs)))]
    heapq.heapify(solutions)
    number = len(solutions)
    while len(solutions) > 1:
        a, b = heapq.heappop(solutions)[2], heapq.heappop(solutions)[2]
        free = parts - len(b)  # so many of a's groups meet an empty one of b
        met = max(0, len(a) - free)
        joined = [(x + y, i + j) for (x, i), (y, j) in zip(a[free:], reversed(b), strict=False)]
        groups = sorted([*a[:free], *joined, *b[: len(b) - met]], key=lambda group: (-group[0], group[1]))
        heapq.heappush(solutions, (-spread(groups), number, groups))
        number += 1
    found = [indices for _, indices in solutions[0][2]] if solutions else []
    return found + [[] for _ in range(parts - len(found))]


def plan(
    rows: Sequence[Sequence[int]], *, max_tokens: int, packing: bool, ranks: int, pad_multiple: int = 1, multiple: int = 1
) -> list[list[list[int]]]:
    """Micro-batches of every rank, each a list of places in `rows`; every rank has equally many, a multiple of `multiple`.

    rows: token lengths of each row's samples. A micro-batch has at most `max_tokens` tokens with its padding: packed the sum of its
    lengths, padded the number of its samples x the longest, either rounded up to `pad_multiple`. A rank that runs out of rows gets
    micro-batches without any: the caller fills them with something of weight 0.
    Raises DataError where a row alone has more tokens.
    """
    costs = [_cost(row, packing, pad_multiple) for row in rows]
    for place, cost in enumerate(costs):
        if cost > max_tokens:
            raise DataError(
                f"a row of {cost:,} tokens does not fit in a micro-batch of {max_tokens:,} (samples of {', '.join(map(str, rows[place]))} tokens)",
                where="train.max_tokens_per_micro_batch",
                expected=f"{cost} or more",
            )
    shares = largest_differencing(costs, ranks)
    if packing:
        # what rounds up to max_tokens or less is what is below its last multiple
        found = [_packed([sum(rows[i]) for i in share], share, max_tokens // pad_multiple * pad_multiple) for share in shares]
    else:
        found = [_padded([(len(rows[i]), costs[i] // len(rows[i])) for i in share], share, max_tokens) for share in shares]
    count = -(-max(map(len, found)) // multiple) * multiple
    return [[sorted(group) for group in _widen(groups, count, costs)] for groups in found]


def share(
    rows: Sequence[int],
    lengths_of: Callable[[int], Sequence[int]],
    *,
    micro_batch_size: int,
    max_tokens: int | None,
    packing: bool,
    rank: int,
    ranks: int,
    pad_multiple: int,
    multiple: int,
) -> list[list[int]]:
    """The rows of every micro-batch of one data-parallel rank, -1 for a filler.

    With `max_tokens` by `plan`, fillers among `rows` left out; else `micro_batch_size` rows each, in the order of `rows`.
    """
    if max_tokens is not None:
        real = [row for row in rows if row >= 0]
        lengths = [lengths_of(row) for row in real]
        groups = plan(lengths, max_tokens=max_tokens, packing=packing, ranks=ranks, pad_multiple=pad_multiple, multiple=multiple)
        return [[real[i] for i in group] or [-1] for group in groups[rank]]
    unit = micro_batch_size * ranks
    assert len(rows) % unit == 0, (len(rows), unit)
    starts = [at + rank * micro_batch_size for at in range(0, len(rows), unit)]
    return [list(rows[start : start + micro_batch_size]) for start in starts]


def _cost(row: Sequence[int], packing: bool, pad_multiple: int) -> int:
    tokens = sum(row) if packing else max(row)
    return -(-tokens // pad_multiple) * pad_multiple * (1 if packing else len(row))


def _packed(costs: list[int], places: list[int], capacity: int) -> list[list[int]]:
    """As few groups as best-fit-decreasing needs, made equal where they can be."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        at = bisect_left(room, (costs[i], -1))
        left, target = room.pop(at) if at < len(room) else (capacity, len(bins))
        if target == len(bins):
            bins.append([])
        bins[target].append(i)
        insort(room, (left - costs[i], target))
    equal = largest_differencing(costs, len(bins)) if bins else []
    if any(sum(costs[i] for i in group) > capacity for group in equal):
        equal = bins
    return [[places[i] for i in group] for group in equal]


def _padded(shapes: list[tuple[int, int]], places: list[int], capacity: int) -> list[list[int]]:
    """Rows of similar length together: the fewest groups, cut from the longest row on. shapes: (samples, width) of each row."""
    groups: list[list[int]] = []
    width = samples = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][1]):
        if not groups or (samples + shapes[i][0]) * width > capacity:
            groups.append([])
            samples, width = 0, shapes[i][1]
        groups[-1].append(places[i])
        samples += shapes[i][0]
    return groups


def _widen(groups: list[list[int]], count: int, costs: list[int]) -> list[list[int]]:
    """`count` groups: the costliest that has two rows is halved, then empty ones are added."""
    groups = [group for group in groups if group]
    while len(groups) < count:
        divisible = [group for group in groups if len(group) > 1]
        if not divisible:
            return groups + [[] for _ in range(count - len(groups))]
        largest = max(divisible, key=lambda group: sum(costs[i] for i in group))
        groups.remove(largest)
        groups += [[largest[i] for i in half] for half in largest_differencing([costs[i] for i in largest], 2)]
    return groups
