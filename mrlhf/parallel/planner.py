"""Which rank sends which slice of a tensor to which rank, and in which bucket; reshard.py runs the plan.

Both sides give their parameters as slices of HF tensors (models/families). The plan intersects them once: for each
slice that a rank must fill, it finds the ranks that hold it, the rank itself first, then the nearest. No full tensor is
ever gathered.

All messages are numbered by bucket, alike on all ranks: NCCL runs one bucket of a rank after the other, so both ends of
a message must have it in the same bucket. With buckets cut at each rank's own places two ranks could wait for each
other for ever. A bucket is as large as the memory of its busiest rank allows.

Cost of a rank's plan: the slices of its own target, plus world x the slices of the tensors that it holds, plus world x
the tensors of different patterns (the layers of a stage have the same ones). Ranks agree on it without messages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch


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
Shapes = Mapping[str, tuple[int, ...]]  # HF tensor -> [out, in] or [out]
Distance = Callable[[int, int], tuple[int, ...]]  # (src, dst): smaller is preferred


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
    """Transfers from `src` to `dst` in one send. key: the number of its bucket, then its place within the bucket."""

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
        self.world = len(sources)
        self.shapes, self.distance, self.wide = shapes, distance, frozenset(wide)
        self._holders: dict[str, list[tuple[int, str, SliceLike]]] = {}
        for rank, shard in enumerate(sources):
            for name, slices in shard.items():
                for held in slices:
                    self._holders.setdefault(held.hf, []).append((rank, name, held))
        self._ranks = {hf: tuple(rank for rank, _, _ in held) for hf, held in self._holders.items()}
        self._nearest: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._set_targets(targets)
        self._loads: dict[tuple[Any, ...], np.ndarray] = {}

    def _set_targets(self, targets: Sequence[Shard]) -> None:
        self.targets = targets
        self._distinct_targets = list({id(shard): shard for shard in targets}.values())
        self._by_tensor: dict[int, dict[str, list[tuple[str, SliceLike]]]] = {}

    def restricted_to(self, names: Collection[str]) -> Planner:
        """The part of the plan that fills these parameters of the generator."""
        part = copy.copy(self)
        kept = {id(shard): {name: slices for name, slices in shard.items() if name in names} for shard in self.targets}
        part._set_targets([kept[id(shard)] for shard in self.targets])
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

    def _holders_for(self, hf: str, dst: int) -> Iterator[tuple[int, str, SliceLike]]:
        """Holders of a tensor: the rank itself first, then the nearest."""
        ranks, held = self._ranks.get(hf, ()), self._holders.get(hf, [])
        order = self._nearest.get((ranks, dst))
        if order is None:
            order = sorted(range(len(ranks)), key=lambda i: (ranks[i] != dst, self.distance(ranks[i], dst), ranks[i]))
            self._nearest[ranks, dst] = order
        return (held[i] for i in order)

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

    def _wanted(self, shard: Shard) -> dict[str, list[tuple[str, SliceLike]]]:
        """HF tensor -> the parameters of a target that have rows of it, and which rows."""
        if id(shard) not in self._by_tensor:
            by_tensor = self._by_tensor[id(shard)] = {}
            for target, slices in shard.items():
                for wanted in slices:
                    by_tensor.setdefault(wanted.hf, []).append((target, wanted))
        return self._by_tensor[id(shard)]

    def outgoing(self, src: int) -> Iterator[Transfer]:
        """Everything that `src` sends to other ranks."""
        held = [hf for hf, ranks in self._ranks.items() if src in ranks]
        for dst, shard in enumerate(self.targets):
            by_tensor = self._wanted(shard)
            for hf in held if dst != src else ():
                for target, wanted in by_tensor.get(hf, ()):
                    yield from (t for t in self._cover(dst, target, wanted) if t.src == src)

    def _load(self, hf: str, pieces: int, turns: int = 1, turn: int = 0) -> np.ndarray:
        """Numbers that every rank sends and receives of one of `pieces` equal pieces of a tensor, in one of `turns`."""
        by_shard = {id(shard): self._wanted(shard).get(hf, ()) for shard in self._distinct_targets}
        wanted = tuple((n, w.start, w.length) for n, some in enumerate(by_shard.values()) for _, w in some)
        held = tuple((part.start, part.length) for _, _, part in self._holders[hf])
        wide = hf in self.wide
        pattern = pieces, turns, turn, self._ranks[hf], held, wanted, tuple(self.shapes[hf]), wide
        if pattern not in self._loads:
            load = [0] * self.world
            for dst, shard in enumerate(self.targets):
                for t in (t for target, w in by_shard[id(shard)] for t in self._cover(dst, target, w)):
                    if t.src != dst and (dst - t.src) % turns == turn:
                        # messages begin at multiples of 16 bytes, or 8 numbers; fp32 counts twice
                        size = -(-(-(-t.length // pieces) * t.width) // 8) * (16 if wide else 8)
                        load[t.src] += size
                        load[dst] += size
            self._loads[pattern] = np.array(load)
        return self._loads[pattern]

    def bucket_numbers(self, limit: int) -> dict[str, list[list[int]]]:
        """HF tensor -> the buckets of each of its pieces. No rank sends and receives more than `limit` numbers in one,
        unless a single row exceeds it.

        Pieces of different holders (pipeline stages, expert shards) alternate, so that all of them send at the same
        time. A piece has one bucket, or if its rows are too wide for one: bucket (dst - src) % buckets.
        """
        before: dict[tuple[int, ...], int] = {}
        # (numbers of the same holders before a piece, tensor, piece, load)
        places: list[tuple[int, str, int, np.ndarray]] = []
        for hf in filter(self._ranks.__contains__, self.shapes):
            pieces, longest = 1, max(part.length for _, _, part in self._holders[hf])
            load = self._load(hf, pieces)
            while (most := int(load.max())) > max(1, limit // 2) and pieces < longest:
                pieces = min(longest, max(pieces + 1, -(-pieces * most // max(1, limit // 2))))
                load = self._load(hf, pieces)
            turns = self.world if most > limit else 1
            loads = [self._load(hf, pieces, turns, turn) for turn in range(turns)]
            start, size = before.get(self._ranks[hf], 0), math.prod(self.shapes[hf])
            places += [(start + size * i // pieces, hf, i, load) for i in range(pieces) for load in loads]
            before[self._ranks[hf]] = start + size
        numbers: dict[str, list[list[int]]] = {}
        number, together = 0, np.zeros(self.world, dtype=np.int64)
        for _, hf, piece, load in sorted(places, key=lambda place: place[0]):
            if int((together + load).max()) > limit and together.any():
                number, together = number + 1, np.zeros_like(together)
            together += load
            buckets = numbers.setdefault(hf, [])
            buckets += [[]] if piece == len(buckets) else []
            buckets[piece].append(number)
        return numbers

    def messages(self, rank: int, *, limit: int) -> list[Message]:
        """The messages that `rank` sends or receives, in the world's order, of at most `limit` numbers (or one row)."""
        numbers = self.bucket_numbers(4 * limit)
        transfers: dict[tuple[int, bool, int, int], list[Transfer]] = {}
        for t in (*self.outgoing(rank), *(t for t in self.incoming(rank) if t.src != rank)):
            pieces = len(numbers[t.hf])
            for piece, buckets in enumerate(numbers[t.hf]):
                first, end = (t.length * i // pieces for i in (piece, piece + 1))
                if first < end:
                    place = buckets[(t.dst - t.src) % len(buckets)], t.hf in self.wide, t.src, t.dst
                    transfers.setdefault(place, []).append(t if pieces == 1 else t.part(first, end - first))
        messages = []
        for (number, wide, src, dst), some in transfers.items():
            # both ends must cut alike, in whatever order they made the transfers
            some.sort(key=lambda t: (t.hf, t.target, t.target_offset))
            large = [t for t in some if 8 * t.numel > limit]  # each by itself, so that it need not be packed
            lists = [[t for t in some if 8 * t.numel <= limit], *([t] for t in large)]
            for part, cut in enumerate(cut for together in lists for cut in _cut(together, limit)):
                key = number, part, int(wide), (dst - src) % self.world, src
                messages.append(Message(key, src, dst, tuple(cut), wide))
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
