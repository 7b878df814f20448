"""Trainer shards -> generator shards: each rank receives just the slices that its own shard needs.

Both sides describe their parameters as blocks of HF tensors (models/families). The plan intersects them once:
for each block a rank must fill, the ranks that hold it, its own copy first, then the nearest. No full tensor
is ever gathered.

Messages have one order that all ranks know, and every rank starts its own in that order, in buckets of
bounded size: while one bucket is on its way the next is packed and local copies are made. The earliest
message that is not done yet is always started at both of its ends, so no rank waits in a circle. A message
of one contiguous slice goes from the trainer's parameter straight into the generator's; smaller ones and columns
are packed, and only these take memory: at most one bucket, sending and receiving together.

Cost of a rank's plan: the blocks of its own target, plus world x the blocks of the tensors that it holds; no messages
are needed to agree on it. Cost of an exchange: the bytes a rank's new shard needs and does not hold.
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


class BlockLike(Protocol):
    """`length` rows (dim 0) or columns (dim 1) of HF tensor `hf` from `start` on stand at `offset` of the shard."""

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


Shard = Mapping[str, Sequence[BlockLike]]  # parameter -> its blocks, of one rank
Shapes = Mapping[str, tuple[int, ...]]  # HF tensor -> [out, in] or [out]
Distance = Callable[[int, int], tuple[int, ...]]  # (src, dst): smaller is preferred


# (is_send, data, the other rank) of a bucket -> works to wait for
StartMessages = Callable[[Sequence[tuple[bool, torch.Tensor, int]]], list[Any]]


def _start_messages(operations: Sequence[tuple[bool, torch.Tensor, int]]) -> list[Any]:
    return dist.batch_isend_irecv([dist.P2POp(dist.isend if is_send else dist.irecv, data, other) for is_send, data, other in operations])


@dataclass(frozen=True)
class Piece:
    """`length` rows or columns (`dim`) of parameter `source` on rank `src`, to parameter `target` on rank `dst`.

    hf: the tensor they belong to; width: numbers in each row or column.
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

    def part(self, first: int, length: int) -> Piece:
        return replace(self, source_offset=self.source_offset + first, target_offset=self.target_offset + first, length=length)


@dataclass(frozen=True)
class Message:
    """What goes from `src` to `dst` at once. `key`: its place in the order of all messages of the world."""

    key: tuple[int, ...]
    src: int
    dst: int
    pieces: tuple[Piece, ...]
    wide: bool = False  # fp32, whatever the others are

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.pieces)


class Planner:
    """Which rank fills which block from where. sources, targets: the shards of every rank of the world, by rank; wide: tensors kept in fp32."""

    def __init__(
        self, sources: Sequence[Shard], targets: Sequence[Shard], *, shapes: Shapes, distance: Distance, wide: Collection[str] = ()
    ) -> None:
        self.world, self.shapes, self.distance, self.targets, self.wide = len(sources), shapes, distance, targets, frozenset(wide)
        self._holders: dict[str, list[tuple[int, str, BlockLike]]] = {}
        for rank, shard in enumerate(sources):
            for name, blocks in shard.items():
                for block in blocks:
                    self._holders.setdefault(block.hf, []).append((rank, name, block))
        self._ranks = {hf: tuple(rank for rank, _, _ in held) for hf, held in self._holders.items()}
        self._nearest: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._by_tensor: dict[int, dict[str, list[tuple[str, BlockLike]]]] = {}

    def only(self, names: Collection[str]) -> Planner:
        """The part of the plan that fills these parameters of the generator."""
        part = copy.copy(self)
        kept = {id(shard): {name: blocks for name, blocks in shard.items() if name in names} for shard in self.targets}
        part.targets, part._by_tensor = [kept[id(shard)] for shard in self.targets], {}
        return part

    def rounds(self, names: Collection[str], limit: int) -> list[list[str]]:
        """The generator's parameters `names`, in parts of at most `limit` numbers of a rank, or one parameter of every set of holders.

        As in `groups`, parameters of different holders (pipeline stages) are in the same part, so that all of them send at the same time.
        """
        holders: dict[frozenset[int], list[str]] = {}
        for name, blocks in self.targets[0].items():
            if name in names:
                holders.setdefault(frozenset(self._ranks[blocks[0].hf]), []).append(name)
        found: list[list[str]] = []
        for some in holders.values():
            number, room = -1, 0
            for name in some:
                size = math.prod(self.shape(name))
                if number < 0 or size > room:
                    number, room = number + 1, limit // len(holders)
                    found += [[]] if number == len(found) else []
                found[number].append(name)
                room -= size
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter of the generator, on every rank."""
        blocks = self.targets[0][name]
        shape = list(self.shapes[blocks[0].hf])
        shape[blocks[0].dim] = max(b.offset + b.length for b in blocks)
        return tuple(shape)

    def _holders_for(self, hf: str, dst: int) -> list[tuple[int, str, BlockLike]]:
        """The rank itself, then the nearest."""
        ranks, held = self._ranks.get(hf, ()), self._holders.get(hf, [])
        order = self._nearest.get((ranks, dst))
        if order is None:
            order = sorted(range(len(ranks)), key=lambda i: (ranks[i] != dst, self.distance(ranks[i], dst), ranks[i]))
            self._nearest[ranks, dst] = order
        return [held[i] for i in order]

    def _cover(self, dst: int, target: str, block: BlockLike) -> Iterator[Piece]:
        """Every row of the block once."""
        shape = self.shapes[block.hf]
        width = math.prod(shape) // shape[block.dim]
        missing = [(block.start, block.start + block.length)]
        for src, source, held in self._holders_for(block.hf, dst):
            assert held.dim == block.dim, f"{block.hf} is split along different dimensions"
            rest = []
            for low, high in missing:
                a, b = max(low, held.start), min(high, held.start + held.length)
                if a >= b:
                    rest.append((low, high))
                    continue
                offsets = held.offset + a - held.start, block.offset + a - block.start
                yield Piece(block.hf, src, dst, source, target, block.dim, *offsets, b - a, width)
                rest += [(low, a)] if low < a else []
                rest += [(b, high)] if b < high else []
            missing = rest
            if not missing:
                return
        raise AssertionError(f"no rank holds {block.hf} {missing}")

    def incoming(self, dst: int) -> Iterator[Piece]:
        """Everything that `dst` needs, its own copies among it."""
        for target, blocks in self.targets[dst].items():
            for block in blocks:
                yield from self._cover(dst, target, block)

    def outgoing(self, src: int) -> Iterator[Piece]:
        """Everything that `src` sends to others."""
        held = [hf for hf, ranks in self._ranks.items() if src in ranks]
        for dst, shard in enumerate(self.targets):
            if dst == src:
                continue
            if id(shard) not in self._by_tensor:
                by_tensor: dict[str, list[tuple[str, BlockLike]]] = {}
                for target, blocks in shard.items():
                    for block in blocks:
                        by_tensor.setdefault(block.hf, []).append((target, block))
                self._by_tensor[id(shard)] = by_tensor
            for hf in held:
                for target, block in self._by_tensor[id(shard)].get(hf, []):
                    yield from (p for p in self._cover(dst, target, block) if p.src == src)

    def groups(self, limit: int) -> dict[str, tuple[int, int]]:
        """HF tensor -> (number, holders): consecutive tensors of the same holders, up to `limit` numbers together.

        Groups of different holders (pipeline stages, shares of the experts) get the same numbers, so that all of them send at the same time.
        """
        found: dict[str, tuple[int, int]] = {}
        holders: dict[tuple[tuple[int, ...], bool], list[int]] = {}  # -> [index, number of the group, its size]
        for hf, shape in self.shapes.items():
            if hf not in self._ranks:
                continue
            place = holders.setdefault((self._ranks[hf], hf in self.wide), [len(holders), 0, 0])
            if place[2] and place[2] + math.prod(shape) > limit:
                place[1:] = [place[1] + 1, 0]
            place[2] += math.prod(shape)
            found[hf] = (place[1], place[0])
        return found

    def messages(self, rank: int, *, limit: int) -> list[Message]:
        """Those that `rank` sends or receives, in the world's order, of at most `limit` numbers (or one row)."""
        groups = self.groups(4 * limit)
        pieces: dict[tuple[int, int, int, int], list[Piece]] = {}
        for p in (*self.outgoing(rank), *(p for p in self.incoming(rank) if p.src != rank)):
            pieces.setdefault((*groups[p.hf], p.src, p.dst), []).append(p)
        found = []
        for (number, holders, src, dst), some in pieces.items():
            # both ends must cut alike, whatever order they found the pieces in
            some.sort(key=lambda p: (p.hf, p.target, p.target_offset))
            for part, cut in enumerate(_cut(some, limit)):
                found.append(Message((number, part, holders, (dst - src) % self.world, src), src, dst, tuple(cut), cut[0].hf in self.wide))
        return sorted(found, key=lambda m: m.key)

    def nbytes(self, piece: Piece, itemsize: int) -> int:
        return piece.numel * (4 if piece.hf in self.wide else itemsize)

    def bytes_of_ranks(self, itemsize: int) -> list[tuple[int, int, int]]:
        """(sent, received, copied within the rank) of every rank. Cost: world x blocks."""
        found = [[0, 0, 0] for _ in range(self.world)]
        for dst in range(self.world):
            for p in self.incoming(dst):
                size = self.nbytes(p, itemsize)
                if p.src == dst:
                    found[dst][2] += size
                else:
                    found[p.src][0] += size
                    found[dst][1] += size
        return [(sent, received, copied) for sent, received, copied in found]


def _cut(pieces: Sequence[Piece], limit: int) -> Iterator[list[Piece]]:
    """Lists of pieces of at most `limit` numbers together; a piece that does not fit is cut, by rows or columns."""
    current: list[Piece] = []
    room = limit
    for p in pieces:
        first = 0
        while first < p.length:
            length = min(p.length - first, room // p.width)
            if length <= 0 and current:
                yield current
                current, room = [], limit
                continue
            length = max(length, 1)
            current.append(p.part(first, length))
            room -= length * p.width
            first += length
    if current:
        yield current


def describe(rows: Sequence[tuple[int, int, int]], *, most: int = 16) -> list[str]:
    """Lines for (sent, received, copied) bytes of every rank."""
    mib = [tuple(x / 2**20 for x in row) for row in rows]
    total, worst = sum(row[1] for row in mib), max(row[1] for row in mib)
    lines = [f"reshard  {total:,.1f} MiB between ranks, at most {worst:,.1f} MiB to one"]
    lines += [f"         rank {rank}: sends {s:,.1f}, receives {r:,.1f}, copies {c:,.1f} MiB" for rank, (s, r, c) in enumerate(mib[:most])]
    return lines + ([f"         and {len(mib) - most} more ranks"] if len(mib) > most else [])


class Reshard:
    """The plan of one pair of layouts, and its execution as often as wanted.

    dtype: of the messages, the generator's; bucket_bytes: memory for packing and unpacking; start_messages: see `StartMessages`.
    """

    def __init__(self, planner: Planner, *, rank: int, dtype: torch.dtype, bucket_bytes: int, start_messages: StartMessages | None = None) -> None:
        self.rank, self.dtype, self.start_messages = rank, dtype, start_messages or _start_messages
        half = max(1, bucket_bytes // 2)  # two buckets are under way at once
        self.copies = [p for p in planner.incoming(rank) if p.src == rank]
        messages = planner.messages(rank, limit=max(1, half // 4 // dtype.itemsize))
        self.buckets: list[list[Message]] = []
        room = 0
        for message in messages:
            if self.room(message) > room:
                self.buckets.append([])
                room = half
            self.buckets[-1].append(message)
            room -= self.room(message)
        pieces = [p for m in messages for p in m.pieces]
        self.sent = sum(planner.nbytes(p, dtype.itemsize) for p in pieces if p.src == rank)
        self.received = sum(planner.nbytes(p, dtype.itemsize) for p in pieces if p.dst == rank)
        self.copied = sum(planner.nbytes(p, dtype.itemsize) for p in self.copies)
        self.packing_bytes = 0  # packing memory of the last exchange

    def dtype_of(self, message: Message) -> torch.dtype:
        return torch.float32 if message.wide else self.dtype

    def room(self, message: Message) -> int:
        """Bytes of packing memory, where every message begins at a multiple of 16."""
        return -(-message.numel * self.dtype_of(message).itemsize // 16) * 16

    @torch.no_grad()
    def exchange(self, source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> float:
        """Writes this rank's target parameters in place; collective. Returns the seconds it took."""
        start = time.perf_counter()
        per_bucket = -(-len(self.copies) // max(1, len(self.buckets)))
        largest = max((sum(map(self.room, bucket)) for bucket in self.buckets), default=0)
        sample = next(iter((source or target).values()))
        memory = [torch.empty(largest, dtype=torch.uint8, device=sample.device) for _ in self.buckets[:2]]  # in turns
        self.packing_bytes = sum(m.nbytes for m in memory)
        under_way: _Bucket | None = None
        for i in range(max(1, len(self.buckets))):
            following = None
            if self.buckets:
                following = _Bucket(self, self.buckets[i], source, target, memory[i % 2])
            for p in self.copies[i * per_bucket : (i + 1) * per_bucket]:
                _target(p, target).copy_(_source(p, source))
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

    def __init__(
        self,
        reshard: Reshard,
        messages: Sequence[Message],
        source: Mapping[str, torch.Tensor],
        target: Mapping[str, torch.Tensor],
        memory: torch.Tensor,
    ) -> None:
        rank, self._target_tensors = reshard.rank, target
        sends = [m for m in messages if m.src == rank]
        receives = [m for m in messages if m.dst == rank]
        straight = {m.key: _whole(_source(m.pieces[0], source), reshard.dtype_of(m)) for m in sends if len(m.pieces) == 1}
        straight |= {m.key: _whole(_target(m.pieces[0], target), reshard.dtype_of(m)) for m in receives if len(m.pieces) == 1}
        at = 0
        self._to_unpack: list[tuple[Message, torch.Tensor]] = []
        operations = []
        for message in messages:
            data = straight.get(message.key)
            if data is None:
                dtype = reshard.dtype_of(message)
                data = memory[at : at + message.numel * dtype.itemsize].view(dtype)
                at += reshard.room(message)
                if message.src == rank:
                    _pack(message, source, data)
                else:
                    self._to_unpack.append((message, data))
            is_send = message.src == rank
            operations.append((is_send, data, message.dst if is_send else message.src))
        self._works = reshard.start_messages(operations)

    def finish(self) -> None:
        """Waits and unpacks."""
        for work in self._works:
            work.wait()
        for message, data in self._to_unpack:
            at = 0
            for p in message.pieces:
                view = _target(p, self._target_tensors)
                view.copy_(data[at : at + p.numel].view(view.shape))
                at += p.numel


def _pack(message: Message, source: Mapping[str, torch.Tensor], data: torch.Tensor) -> None:
    at = 0
    for p in message.pieces:
        view = _source(p, source)
        data[at : at + p.numel].view(view.shape).copy_(view)
        at += p.numel


def _whole(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The slice itself as one row of numbers, where its memory is that."""
    return view.view(-1) if view.is_contiguous() and view.dtype == dtype else None


def _source(p: Piece, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[p.source].narrow(p.dim, p.source_offset, p.length)


def _target(p: Piece, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[p.target].narrow(p.dim, p.target_offset, p.length)
