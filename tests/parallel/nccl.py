"""Do the messages of a reshard end under NCCL's rules? gloo starts every message at once, so no test on it can tell.

NCCL runs one group of a rank (a bucket) after the other. Within a group the k-th message between two ranks in one
direction waits for the (k-1)-th, and in the worst case, with all on the same channels, for the (k-1)-th messages of all
other ranks too. A message moves when both of its ends have reached it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from mrlhf.parallel.planner import Message


def waves(bucket: Sequence[Message]) -> list[set[tuple[int, ...]]]:
    """Messages that NCCL may move at the same time, in order."""
    before: Counter[tuple[int, int]] = Counter()
    waves: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for message in bucket:
        pair = message.src, message.dst
        waves[before[pair]].add((*message.key, *pair))
        before[pair] += 1
    return [waves[i] for i in sorted(waves)]


def standing_still(ranks: Sequence[Sequence[Sequence[Message]]]) -> int:
    """How many messages never move. ranks: the buckets of every rank."""
    queues = [[wave for bucket in buckets for wave in waves(bucket)] for buckets in ranks]
    ends: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
    for rank, queue in enumerate(queues):
        for message in (message for wave in queue for message in wave):
            assert rank in message[-2:]
            ends[message].add(rank)
    assert all(both == set(message[-2:]) for message, both in ends.items()), "only one end has the message"
    at, reached, left = [0] * len(queues), Counter[tuple[int, ...]](), len(ends)
    entered = [rank for rank, queue in enumerate(queues) if queue]
    remaining = [len(queue[0]) if queue else 0 for queue in queues]
    while entered:
        ready = []
        for rank in entered:
            for message in queues[rank][at[rank]]:
                reached[message] += 1
                ready += [message] if reached[message] == 2 else []
        entered, left = [], left - len(ready)
        for rank in (rank for message in ready for rank in message[-2:]):
            remaining[rank] -= 1
            if not remaining[rank]:
                at[rank] += 1
                if at[rank] < len(queues[rank]):
                    remaining[rank] = len(queues[rank][at[rank]])
                    entered.append(rank)
    return left
