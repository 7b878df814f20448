"""Trainer shards -> generator shards: each rank receives exactly the slices that its own shard needs.

Both sides give their parameters as slices of HF tensors (models/families). The plan intersects them once: for each
slice that a rank must fill, it finds the ranks that hold it, the rank itself first, then the nearest. No full tensor is
ever gathered.

All ranks know one order of all messages, and every rank starts its own in that order, in buckets of bounded size: while
one bucket is under way the next is packed and local copies are made. The earliest unfinished message has always been
started at both ends, so no cycle of ranks can wait for each other. A message of one contiguous slice goes straight from
the trainer's parameter into the generator's. Small slices and columns are packed, and only they take memory: at most
one bucket for sending and receiving together.

Cost of a rank's plan: the slices of its own target, plus world x the slices of the tensors that it holds; ranks agree
on it without messages. Cost of an exchange: the bytes that a rank's new shard needs and the rank does not hold.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist


class SliceLike(Protocol):
    """Rows (dim 0) or columns (dim 1) start .. start + length of HF tensor `hf`, which lie at `offset` of the shard."""

    @property
    def hf(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def offset(self) -> int: ...


Shard = Mapping[str, Sequence[SliceLike]]  # of one rank: parameter -> its slices
Tensors = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # HF tensor -> [out, in] or [out]
Distance = Callable[[int, int], tuple[int, ...]]  # (src, dst): smaller is preferred

# (is_send, data, the other rank) of a bucket -> works to wait for
StartMessages = Callable[[Sequence[tuple[bool, torch.Tensor, int]]], list[Any]]


def _start_messages(operations: Sequence[tuple[bool, torch.Tensor, int]]) -> list[Any]:
    calls = [(dist.isend if is_send else dist.irecv, data, other) for is_send, data, other in operations]
    return dist.batch_isend_irecv([dist.P2POp(*call) for call in calls])


@dataclass(frozen=True)
class Transfer:
    """Moves `length` rows or columns (`dim`) of parameter `source` on rank `src` to parameter `target` on rank `dst`.

    hf: the HF tensor they belong to; width: numbers in a row or column.
    """

    hf: str
    src: int
    dst: int
    source: str
    target: str
    dim: int
    source_offset: int
    target_offset: int
    length: int
    width: int

    @property
    def numel(self) -> int:
        return self.length * self.width

    def part(self, first: int, length: int) -> Transfer:
        source, target = self.source_offset + first, self.target_offset + first
        return replace(self, source_offset=source, target_offset=target, length=length)


@dataclass(frozen=True)
class Message:
    """Transfers from `src` to `dst` in one send. key: its place in the order of all messages of the world."""

    key: tuple[int, ...]
    src: int
    dst: int
    transfers: tuple[Transfer, ...]
    wide: bool = False  # fp32, whatever the dtype of other messages

    @property
    def numel(self) -> int:
        return sum(t.numel for t in self.transfers)

    def parts(self, data: torch.Tensor) -> Iterator[tuple[Transfer, torch.Tensor]]:
        """Each transfer with its part of the packed message."""
        return zip(self.transfers, data.split([t.numel for t in self.transfers]), strict=True)


class Planner:
    """Decides which rank fills which slice from where.

    sources, targets: the shards of every rank of the world, by rank. wide: tensors kept in fp32.
    """

    def __init__(self, sources: Sequence[Shard], targets: Sequence[Shard], *, shapes: Shapes, distance: Distance,
                 wide: Collection[str] = ()) -> None:
        self.world, self.targets = len(sources), targets
        self.shapes, self.distance, self.wide = shapes, distance, frozenset(wide)
        self._holders: dict[str, list[tuple[int, str, SliceLike]]] = {}
        for rank, shard in enumerate(sources):
            for name, slices in shard.items():
                for held in slices:
                    self._holders.setdefault(held.hf, []).append((rank, name, held))
        self._ranks = {hf: tuple(rank for rank, _, _ in held) for hf, held in self._holders.items()}
        self._nearest: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._by_tensor: dict[int, dict[str, list[tuple[str, SliceLike]]]] = {}

    def restricted_to(self, names: Collection[str]) -> Planner:
        """The part of the plan that fills these parameters of the generator."""
        part = copy.copy(self)
        kept = {id(shard): {name: slices for name, slices in shard.items() if name in names} for shard in self.targets}
        part.targets, part._by_tensor = [kept[id(shard)] for shard in self.targets], {}
        return part

    def rounds(self, names: Collection[str], limit: int) -> list[list[str]]:
        """`names` in rounds of at most `limit` numbers a rank, or of one parameter for each set of holders.

        A round mixes parameters of different holders (pipeline stages), so that all of them send at the same time.
        """
        holders: dict[frozenset[int], list[str]] = {}
        for name, slices in self.targets[0].items():
            if name in names:
                holders.setdefault(frozenset(self._ranks[slices[0].hf]), []).append(name)
        rounds: list[list[str]] = []
        for some in holders.values():
            number, room = -1, 0
            for name in some:
                size = math.prod(self.shape(name))
                if number < 0 or size > room:
                    number, room = number + 1, limit // len(holders)
                    rounds += [[]] if number == len(rounds) else []
                rounds[number].append(name)
                room -= size
        return rounds

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a rank's shard of a parameter of the generator; equal on all ranks."""
        slices = self.targets[0][name]
        shape = list(self.shapes[slices[0].hf])
        shape[slices[0].dim] = max(part.offset + part.length for part in slices)
        return tuple(shape)

    def _holders_for(self, hf: str, dst: int) -> list[tuple[int, str, SliceLike]]:
        """Holders of a tensor: the rank itself first, then the nearest."""
        ranks, held = self._ranks.get(hf, ()), self._holders.get(hf, [])
        order = self._nearest.get((ranks, dst))
        if order is None:
            order = sorted(range(len(ranks)), key=lambda i: (ranks[i] != dst, self.distance(ranks[i], dst), ranks[i]))
            self._nearest[ranks, dst] = order
        return [held[i] for i in order]

    def _cover(self, dst: int, target: str, wanted: SliceLike) -> Iterator[Transfer]:
        """Transfers that fill every row of `wanted` once."""
        shape = self.shapes[wanted.hf]
        width = math.prod(shape) // shape[wanted.dim]
        missing = [(wanted.start, wanted.start + wanted.length)]
        for src, source, held in self._holders_for(wanted.hf, dst):
            assert held.dim == wanted.dim, f"{wanted.hf} is split along different dimensions"
            rest = []
            for low, high in missing:
                a, b = max(low, held.start), min(high, held.start + held.length)
                if a >= b:
                    rest.append((low, high))
                    continue
                offsets = held.offset + a - held.start, wanted.offset + a - wanted.start
                yield Transfer(wanted.hf, src, dst, source, target, wanted.dim, *offsets, b - a, width)
                rest += [(low, a)] if low < a else []
                rest += [(b, high)] if b < high else []
            missing = rest
            if not missing:
                return
        raise AssertionError(f"no rank holds {wanted.hf} {missing}")

    def incoming(self, dst: int) -> Iterator[Transfer]:
        """Everything that `dst` needs, including what it copies from itself."""
        for target, slices in self.targets[dst].items():
            for wanted in slices:
                yield from self._cover(dst, target, wanted)

    def outgoing(self, src: int) -> Iterator[Transfer]:
        """Everything that `src` sends to other ranks."""
        held = [hf for hf, ranks in self._ranks.items() if src in ranks]
        for dst, shard in enumerate(self.targets):
            if dst == src:
                continue
            if id(shard) not in self._by_tensor:
                by_tensor = self._by_tensor[id(shard)] = {}
                for target, slices in shard.items():
                    for wanted in slices:
                        by_tensor.setdefault(wanted.hf, []).append((target, wanted))
            for hf in held:
                for target, wanted in self._by_tensor[id(shard)].get(hf, []):
                    yield from (t for t in self._cover(dst, target, wanted) if t.src == src)

    def tensor_groups(self, limit: int) -> dict[str, tuple[int, int]]:
        """HF tensor -> (number, holders): a group is consecutive tensors of the same holders, up to `limit` numbers
        together.

        Groups of different holders (pipeline stages, expert shards) share numbers, so that all of them send at the same
        time.
        """
        groups: dict[str, tuple[int, int]] = {}
        holders: dict[tuple[tuple[int, ...], bool], list[int]] = {}  # -> [index, number of the group, its size]
        for hf, shape in self.shapes.items():
            if hf not in self._ranks:
                continue
            place = holders.setdefault((self._ranks[hf], hf in self.wide), [len(holders), 0, 0])
            if place[2] and place[2] + math.prod(shape) > limit:
                place[1:] = [place[1] + 1, 0]
            place[2] += math.prod(shape)
            groups[hf] = (place[1], place[0])
        return groups

    def messages(self, rank: int, *, limit: int) -> list[Message]:
        """The messages that `rank` sends or receives, in the world's order, of at most `limit` numbers (or one row)."""
        groups = self.tensor_groups(4 * limit)
        transfers: dict[tuple[int, int, int, int], list[Transfer]] = {}
        for t in (*self.outgoing(rank), *(t for t in self.incoming(rank) if t.src != rank)):
            transfers.setdefault((*groups[t.hf], t.src, t.dst), []).append(t)
        messages = []
        for (number, holders, src, dst), some in transfers.items():
            # both ends must cut alike, in whatever order they made the transfers
            some.sort(key=lambda t: (t.hf, t.target, t.target_offset))
            for part, cut in enumerate(_cut(some, limit)):
                key = number, part, holders, (dst - src) % self.world, src
                messages.append(Message(key, src, dst, tuple(cut), cut[0].hf in self.wide))
        return sorted(messages, key=lambda m: m.key)

    def nbytes(self, transfer: Transfer, itemsize: int) -> int:
        return transfer.numel * (4 if transfer.hf in self.wide else itemsize)

    def bytes_of_ranks(self, itemsize: int) -> list[tuple[int, int, int]]:
        """(sent, received, copied within the rank) of every rank. Cost: world x slices."""
        sent, received, copied = ([0] * self.world for _ in range(3))
        for dst in range(self.world):
            for t in self.incoming(dst):
                size = self.nbytes(t, itemsize)
                if t.src == dst:
                    copied[dst] += size
                else:
                    sent[t.src] += size
                    received[dst] += size
        return list(zip(sent, received, copied, strict=True))


def _cut(transfers: Sequence[Transfer], limit: int) -> Iterator[list[Transfer]]:
    """Lists of at most `limit` numbers together; a transfer that does not fit is cut, by rows or columns."""
    current: list[Transfer] = []
    room = limit
    for t in transfers:
        first = 0
        while first < t.length:
            length = min(t.length - first, room // t.width)
            if length <= 0 and current:
                yield current
                current, room = [], limit
                continue
            length = max(length, 1)
            current.append(t.part(first, length))
            room -= length * t.width
            first += length
    if current:
        yield current


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
        self.buckets: list[list[Message]] = []
        room = 0
        for message in messages:
            if self.room(message) > room:
                self.buckets.append([])
                room = half
            self.buckets[-1].append(message)
            room -= self.room(message)
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
