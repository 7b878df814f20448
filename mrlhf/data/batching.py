"""Assigns the rows of an optimizer step to data-parallel ranks and micro-batches, by rows or by tokens.

A pure function of the rows' lengths: every rank computes the same result without communication. By tokens, Karmarkar
and Karp's largest differencing divides the rows over the ranks. Each rank then makes micro-batches of at most
`max_tokens` tokens, and all ranks make equally many, as collectives and pipeline schedules need. The samples of a row
(the two answers of a pair) stay together.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mrlhf.errors import DataError


def largest_differencing(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Divides the indices of `costs` (each >= 0) into `parts` groups of nearly equal sums, in descending order of sums.

    Groups may be empty. Every item starts as one solution: a group of this item and parts - 1 empty groups. The
    algorithm joins the two solutions with the largest spread (largest minus smallest sum), the largest group of one
    with the smallest of the other, until one solution is left. Its spread is at most the largest cost. Complexity:
    O(n log n), and at most n x parts additions. Deterministic.
    """
    Groups = list[tuple[int, list[int]]]  # (sum, indices), descending, without empty groups

    def spread(groups: Groups) -> int:
        return groups[0][0] - (groups[-1][0] if len(groups) == parts else 0)

    solutions: list[tuple[int, int, Groups]] = [(-cost, i, [(cost, [i])]) for i, cost in enumerate(costs)]
    if parts == 1:
        return [list(range(len(costs)))]
    heapq.heapify(solutions)
    number = len(solutions)
    while len(solutions) > 1:
        a, b = heapq.heappop(solutions)[2], heapq.heappop(solutions)[2]
        free = parts - len(b)  # as many groups of a join an empty group of b
        met = max(0, len(a) - free)
        joined = [(x + y, i + j) for (x, i), (y, j) in zip(a[free:], reversed(b), strict=False)]
        groups = sorted([*a[:free], *joined, *b[: len(b) - met]], key=lambda group: (-group[0], group[1]))
        heapq.heappush(solutions, (-spread(groups), number, groups))
        number += 1
    filled = [indices for _, indices in solutions[0][2]] if solutions else []
    return filled + [[] for _ in range(parts - len(filled))]


@dataclass(frozen=True)
class BatchPlan:
    """How a data-parallel rank makes micro-batches of rows. training/batches.py makes it for a layout.

    packing: a micro-batch is one row of whole samples; otherwise it has a row per sample, padded on `padding_side` to
    the longest. micro_batch_size: rows of a micro-batch. max_tokens: replaces micro_batch_size by a limit on the tokens
    of a micro-batch, with padding. pad_multiple: T is a multiple of it (context and sequence parallelism split rows).
    micro_batch_multiple: a forward pass has a multiple of so many micro-batches (interleaved pipelines).
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

    def with_fillers(self, rows: Sequence[int]) -> list[int]:
        """The rows, and as many fillers (-1) as whole slices need."""
        return [*rows, *[-1] * (-len(rows) % self.rows_per_slice)]

    def split(self, rows: Sequence[int], lengths_of: Callable[[int], Sequence[int]]) -> list[list[int]]:
        """The rows of each of this rank's micro-batches, -1 for a filler.

        With `max_tokens`, `split_by_tokens` divides the rows and ignores fillers among them. Otherwise each micro-batch
        has `micro_batch_size` rows in the order of `rows`, and their number must be a multiple of micro_batch_size x
        dp_size. lengths_of(row): token lengths of the row's samples.
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
    """The micro-batches of every rank, as lists of indices into `rows`. All ranks get equally many, a multiple of
    `micro_batch_multiple`.

    rows: token lengths of each row's samples. A micro-batch has at most `max_tokens` tokens with padding: packed, the
    sum of its lengths; padded, the number of its samples x the longest; each rounded up to `pad_multiple`. Micro-
    batches without rows are possible: the caller fills them with rows of weight 0. Raises DataError for a row that
    exceeds `max_tokens`.
    """
    costs = [_cost(row, plan.packing, plan.pad_multiple) for row in rows]
    for row, cost in zip(rows, costs, strict=True):
        if cost > max_tokens:
            samples, limit = ", ".join(map(str, row)), f"{max_tokens:,}"
            what = f"a row of {cost:,} tokens does not fit in a micro-batch of {limit} (samples of {samples} tokens)"
            raise DataError(what, where="train.max_tokens_per_micro_batch", expected=f"{cost} or more")
    shares = largest_differencing(costs, plan.dp_size)
    if plan.packing:  # the capacity is the last multiple of pad_multiple below max_tokens
        capacity = max_tokens // plan.pad_multiple * plan.pad_multiple
        ranks = [_pack_rows([sum(rows[i]) for i in share], share, capacity) for share in shares]
    else:
        ranks = [_group_by_length([(len(rows[i]), costs[i] // len(rows[i])) for i in share], share, max_tokens)
                 for share in shares]
    count = -(-max(map(len, ranks)) // plan.micro_batch_multiple) * plan.micro_batch_multiple
    return [[sorted(group) for group in _split_to_count(groups, count, costs)] for groups in ranks]


def _cost(row: Sequence[int], packing: bool, pad_multiple: int) -> int:
    tokens = sum(row) if packing else max(row)
    return -(-tokens // pad_multiple) * pad_multiple * (1 if packing else len(row))


def _pack_rows(costs: list[int], places: list[int], capacity: int) -> list[list[int]]:
    """Groups of at most `capacity`: as many as best-fit decreasing needs, of nearly equal sums if that is possible."""
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


def _group_by_length(shapes: list[tuple[int, int]], places: list[int], capacity: int) -> list[list[int]]:
    """The fewest groups of rows of similar length, from the longest row on. shapes: (samples, width) of each row."""
    groups: list[list[int]] = []
    width = samples = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][1]):
        if not groups or (samples + shapes[i][0]) * width > capacity:
            groups.append([])
            samples, width = 0, shapes[i][1]
        groups[-1].append(places[i])
        samples += shapes[i][0]
    return groups


def _split_to_count(groups: list[list[int]], count: int, costs: list[int]) -> list[list[int]]:
    """Makes `count` groups: halves the costliest group of several rows repeatedly, then adds empty groups."""
    groups = [group for group in groups if group]
    while len(groups) < count:
        divisible = [group for group in groups if len(group) > 1]
        if not divisible:
            return groups + [[] for _ in range(count - len(groups))]
        largest = max(divisible, key=lambda group: sum(costs[i] for i in group))
        groups.remove(largest)
        groups += [[largest[i] for i in half] for half in largest_differencing([costs[i] for i in largest], 2)]
    return groups
