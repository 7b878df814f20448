"""Trainer shards -> generator shards: each rank receives exactly the slices that its own shard needs.

Every rank starts the messages of its plan (planner.py) bucket by bucket: while one is under way the next is packed and
local copies are made. A message of one contiguous slice goes straight from the trainer's parameter into the
generator's. Small slices and columns are packed, and only they take memory: at most one bucket for sending and
receiving together.

Cost of an exchange: the bytes that a rank's new shard needs and the rank does not hold.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.parallel.planner import Message, Planner, Transfer

Tensors = Mapping[str, torch.Tensor]

# (is_send, data, the other rank) of a bucket -> works to wait for
StartMessages = Callable[[Sequence[tuple[bool, torch.Tensor, int]]], list[Any]]


def _start_messages(operations: Sequence[tuple[bool, torch.Tensor, int]]) -> list[Any]:
    calls = [(dist.isend if is_send else dist.irecv, data, other) for is_send, data, other in operations]
    return dist.batch_isend_irecv([dist.P2POp(*call) for call in calls])


def traffic_summary(rows: Sequence[tuple[int, int, int]], *, most: int = 16) -> list[str]:
    """Lines of text for the (sent, received, copied) bytes of every rank."""
    mib = [tuple(x / 2**20 for x in row) for row in rows]
    total, worst = sum(row[1] for row in mib), max(row[1] for row in mib)
    lines = [f"reshard  {total:,.1f} MiB between ranks, at most {worst:,.1f} MiB to one"]
    for rank, (sent, received, copied) in enumerate(mib[:most]):
        lines.append(f"         rank {rank}: sends {sent:,.1f}, receives {received:,.1f}, copies {copied:,.1f} MiB")
    return lines + ([f"         and {len(mib) - most} more ranks"] if len(mib) > most else [])


class Reshard:
    """A rank's plan for one pair of layouts; `exchange` runs it, any number of times.

    dtype: of messages and of the generator. bucket_bytes: memory for packing and unpacking.
    """

    def __init__(self, planner: Planner, *, rank: int, dtype: torch.dtype, bucket_bytes: int,
                 start_messages: StartMessages | None = None) -> None:
        self.rank, self.dtype, self.start_messages = rank, dtype, start_messages or _start_messages
        half = max(1, bucket_bytes // 2)  # two buckets are under way at once
        self.copies = [t for t in planner.incoming(rank) if t.src == rank]
        messages = planner.messages(rank, limit=max(1, half // 4 // dtype.itemsize))
        self.buckets = [list(bucket) for _, bucket in itertools.groupby(messages, key=lambda m: m.key[0])]
        transfers = [t for m in messages for t in m.transfers]
        self.sent = sum(planner.nbytes(t, dtype.itemsize) for t in transfers if t.src == rank)
        self.received = sum(planner.nbytes(t, dtype.itemsize) for t in transfers if t.dst == rank)
        self.copied = sum(planner.nbytes(t, dtype.itemsize) for t in self.copies)
        self.packing_bytes = 0  # packing memory of the last exchange

    def dtype_of(self, message: Message) -> torch.dtype:
        return torch.float32 if message.wide else self.dtype

    def room(self, message: Message) -> int:
        """Bytes of packing memory; every message begins at a multiple of 16."""
        return -(-message.numel * self.dtype_of(message).itemsize // 16) * 16

    @torch.no_grad()
    def exchange(self, source: Tensors, target: Tensors) -> float:
        """Collective. Writes this rank's target parameters in place; returns the seconds it took."""
        start = time.perf_counter()
        per_bucket = -(-len(self.copies) // max(1, len(self.buckets)))
        largest = max((sum(map(self.room, bucket)) for bucket in self.buckets), default=0)
        sample = next(iter((source or target).values()))
        # used in turn
        memory = [torch.empty(largest, dtype=torch.uint8, device=sample.device) for _ in self.buckets[:2]]
        self.packing_bytes = sum(m.nbytes for m in memory)
        under_way: _Bucket | None = None
        for i in range(max(1, len(self.buckets))):
            following = _Bucket(self, self.buckets[i], source, target, memory[i % 2]) if self.buckets else None
            for t in self.copies[i * per_bucket : (i + 1) * per_bucket]:
                _target(t, target).copy_(_source(t, source))
            if under_way is not None:
                under_way.finish()
            under_way = following
        if under_way is not None:
            under_way.finish()
        if sample.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


class _Bucket:
    """Messages under way. `memory`: for packing, until `finish`."""

    def __init__(self, reshard: Reshard, messages: Sequence[Message], source: Tensors, target: Tensors,
                 memory: torch.Tensor) -> None:
        self._target_tensors, offset = target, 0
        self._to_unpack: list[tuple[Message, torch.Tensor]] = []
        operations = []
        for message in messages:
            is_send, data, dtype = message.src == reshard.rank, None, reshard.dtype_of(message)
            if len(message.transfers) == 1:
                [t] = message.transfers
                data = _whole(_source(t, source) if is_send else _target(t, target), dtype)
            if data is None:
                data = memory[offset : offset + message.numel * dtype.itemsize].view(dtype)
                offset += reshard.room(message)
                if is_send:
                    for t, part in message.parts(data):
                        view = _source(t, source)
                        part.view(view.shape).copy_(view)
                else:
                    self._to_unpack.append((message, data))
            operations.append((is_send, data, message.dst if is_send else message.src))
        self._works = reshard.start_messages(operations)

    def finish(self) -> None:
        """Waits and unpacks."""
        for work in self._works:
            work.wait()
        for message, data in self._to_unpack:
            for t, part in message.parts(data):
                view = _target(t, self._target_tensors)
                view.copy_(part.view(view.shape))


def _whole(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The slice as one row of numbers if its memory is contiguous and of this dtype."""
    return view.view(-1) if view.is_contiguous() and view.dtype == dtype else None


def _source(t: Transfer, tensors: Tensors) -> torch.Tensor:
    return tensors[t.source].narrow(t.dim, t.source_offset, t.length)


def _target(t: Transfer, tensors: Tensors) -> torch.Tensor:
    return tensors[t.target].narrow(t.dim, t.target_offset, t.length)
