"""Micro-batches by tokens: which rows of an optimizer step go to which data-parallel rank, and in which micro-batch.

A pure function of the rows' lengths, computed alike on every rank, so that nothing has to be sent. Rows are shared out
over the ranks by Karmarkar and Karp's largest differencing; each rank then makes micro-batches of at most so many
tokens, and all ranks equally many of them, as collectives and pipeline schedules need. A row's samples (the two answers
of a pair) stay together.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mrlhf.errors import DataError


def largest_differencing(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `costs` (each 0 or more) in `parts` groups of nearly equal sums, the greatest sum first; groups may be
    empty.

    Every item starts as a solution of its own: it alone, and parts - 1 empty groups. The two solutions with the largest
    spread (greatest minus least sum) are laid over each other, the greatest sum of one on the least of the other, until
    one is left. Its spread is at most the largest cost. Cost: O(n log n) and at most n x parts additions; equal input
    gives equal output.
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
    filled = [indices for _, indices in solutions[0][2]] if solutions else []
    return filled + [[] for _ in range(parts - len(filled))]


@dataclass(frozen=True)
class BatchPlan:
    """How a data-parallel rank turns rows into micro-batches. Made once for a layout (training/batch_plan.py), then
    passed around.

    packing: a micro-batch is one row of whole samples; otherwise a row per sample, padded on `padding_side` to the
    longest. micro_batch_size: rows of a micro-batch. max_tokens: tokens of a micro-batch with its padding, instead of
    micro_batch_size. pad_multiple: T is a multiple of it (context and sequence parallelism cut rows).
    micro_batch_multiple: the number of micro-batches of a forward pass is a multiple of it (interleaved pipelines).
    """

    packing: bool
    micro_batch_size: int = 1
    max_tokens: int | None = None
    dp_rank: int = 0
    dp_size: int = 1
    pad_multiple: int = 1
    micro_batch_multiple: int = 1
    padding_side: str = "right"

    @property
    def rows_per_slice(self) -> int:
        """The smallest number of rows that gives every rank equally many whole micro-batches."""
        rows = self.micro_batch_size if self.max_tokens is None else 1
        return rows * self.dp_size * self.micro_batch_multiple

    def split(self, rows: Sequence[int], lengths_of: Callable[[int], Sequence[int]]) -> list[list[int]]:
        """The rows of every micro-batch of this rank, -1 for a filler.

        With `max_tokens` by `split_by_tokens`, without the fillers among `rows`; else `micro_batch_size` rows each, in
        the order of `rows`, whose number is then a multiple of micro_batch_size x dp_size. lengths_of(row): token
        lengths of the row's samples.
        """
        if self.max_tokens is not None:
            real = [row for row in rows if row >= 0]
            groups = split_by_tokens([lengths_of(row) for row in real], self, max_tokens=self.max_tokens)
            return [[real[i] for i in group] or [-1] for group in groups[self.dp_rank]]
        size = self.micro_batch_size
        assert len(rows) % (size * self.dp_size) == 0, (len(rows), size, self.dp_size)
        starts = range(self.dp_rank * size, len(rows), size * self.dp_size)
        return [list(rows[start : start + size]) for start in starts]


def split_by_tokens(rows: Sequence[Sequence[int]], plan: BatchPlan, *, max_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of every rank, each a list of indices into `rows`; all ranks get equally many, a multiple of
    `micro_batch_multiple`.

    rows: token lengths of each row's samples. A micro-batch has at most `max_tokens` tokens with its padding: packed
    the sum of its lengths, padded the number of its samples x the longest, either rounded up to `pad_multiple`. A rank
    that runs out of rows gets micro-batches without any: the caller fills them with rows of weight 0. Raises DataError
    where a row alone has more tokens.
    """
    costs = [_cost(row, plan.packing, plan.pad_multiple) for row in rows]
    for row, cost in zip(rows, costs, strict=True):
        if cost > max_tokens:
            samples = ", ".join(map(str, row))
            raise DataError(
                f"a row of {cost:,} tokens does not fit in a micro-batch of {max_tokens:,} (samples of {samples})",
                where="train.max_tokens_per_micro_batch",
                expected=f"{cost} or more",
            )
    shares = largest_differencing(costs, plan.dp_size)
    if plan.packing:  # the capacity is the last multiple of pad_multiple below max_tokens
        capacity = max_tokens // plan.pad_multiple * plan.pad_multiple
        ranks = [_packed([sum(rows[i]) for i in share], share, capacity) for share in shares]
    else:
        ranks = [_padded([(len(rows[i]), costs[i] // len(rows[i])) for i in share], share, max_tokens)
                 for share in shares]
    count = -(-max(map(len, ranks)) // plan.micro_batch_multiple) * plan.micro_batch_multiple
    return [[sorted(group) for group in _widen(groups, count, costs)] for groups in ranks]


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
    """Rows of similar length together: the fewest groups, cut from the longest row on. shapes: (samples, width) of each
    row.
    """
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
