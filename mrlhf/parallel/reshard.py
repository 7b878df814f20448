"""Trainer shards -> generator shards: each rank receives just the slices that its own shard needs.

Both sides describe their parameters as blocks of HF tensors (models/families). The plan intersects them once:
for each block a rank must fill, the ranks that hold it, its own copy first, then the one in its own
data-parallel replica. No full tensor is ever gathered. The exchange runs bucket by bucket, so that the
extra memory is at most one bucket for sending and one for receiving.

Cost of the plan: O(world x blocks) intersections once at start; every rank computes the same plan, so no
messages are needed to agree on it. Cost of an exchange: the bytes a rank's new shard needs and does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True)
class Piece:
    """`length` rows or columns (`dim`) of parameter `source` on rank `src`, to parameter `target` on rank `dst`."""

    src: int
    dst: int
    source: str
    target: str
    dim: int
    source_offset: int
    target_offset: int
    length: int


def _holders(sources: Sequence[Shard]) -> dict[str, list[tuple[int, str, BlockLike]]]:
    found: dict[str, list[tuple[int, str, BlockLike]]] = {}
    for rank, shard in enumerate(sources):
        for name, blocks in shard.items():
            for block in blocks:
                found.setdefault(block.hf, []).append((rank, name, block))
    return found


def _pieces(dst: int, target: str, block: BlockLike, holders: list[tuple[int, str, BlockLike]]) -> list[Piece]:
    """Cover `block` once, from the holders in their order."""
    missing, found = [(block.start, block.start + block.length)], []
    for src, source, held in holders:
        assert held.dim == block.dim, f"{block.hf} is split along different dimensions"
        rest = []
        for low, high in missing:
            a, b = max(low, held.start), min(high, held.start + held.length)
            if a >= b:
                rest.append((low, high))
                continue
            found.append(Piece(src, dst, source, target, block.dim, held.offset + a - held.start, block.offset + a - block.start, b - a))
            rest += [(low, a)] if low < a else []
            rest += [(b, high)] if b < high else []
        missing = rest
        if not missing:
            return found
    raise AssertionError(f"no rank holds {block.hf} {missing}")


def make_plan(
    sources: Sequence[Shard], targets: Sequence[Shard], *, distance: Callable[[int, int], tuple[int, ...]]
) -> dict[str, list[Piece]]:
    """HF tensor -> pieces of all ranks. `distance(src, dst)`: smaller is preferred; a rank's own copy always wins."""
    holders = _holders(sources)
    plan: dict[str, list[Piece]] = {}
    for dst, shard in enumerate(targets):
        for target, blocks in shard.items():
            for block in blocks:
                near = sorted(holders.get(block.hf, []), key=lambda h: (h[0] != dst, distance(h[0], dst), h[0]))
                plan.setdefault(block.hf, []).extend(_pieces(dst, target, block, near))
    return plan


class Reshard:
    """The plan of one pair of layouts, and its execution as often as wanted.

    sources, targets: the shards of every rank of the world, by rank. `exchange` writes this rank's target
    parameters in place.
    """

    def __init__(
        self, sources: Sequence[Shard], targets: Sequence[Shard], *, distance: Callable[[int, int], tuple[int, ...]], rank: int
    ) -> None:
        self.rank, self.world = rank, len(sources)
        plan = make_plan(sources, targets, distance=distance)
        self._buckets: list[list[Piece]] = []  # of this rank: what it sends, receives or copies
        self._is_remote: list[bool] = []  # whether any rank sends anything in the bucket
        mine: list[Piece] = []
        size, remote = 0, False
        self.remote_pieces = sum(p.src != p.dst for pieces in plan.values() for p in pieces)
        for pieces in plan.values():
            mine += [p for p in pieces if rank in (p.src, p.dst)]
            remote |= any(p.src != p.dst for p in pieces)
            size += max((p.length for p in pieces), default=0)
            if size >= 4096:  # rows; bounds a bucket without knowing the row length, and is the same on all ranks
                self._buckets.append(mine)
                self._is_remote.append(remote)
                mine, size, remote = [], 0, False
        if mine or remote:
            self._buckets.append(mine)
            self._is_remote.append(remote)

    @torch.no_grad()
    def exchange(self, source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> tuple[int, float]:
        """Collective. Returns (bytes received from other ranks, seconds)."""
        start, received = time.perf_counter(), 0
        for pieces, is_remote in zip(self._buckets, self._is_remote, strict=True):
            for p in pieces:
                if p.src == p.dst:
                    _target(p, target).copy_(_source(p, source))
            if is_remote:
                received += self._swap([p for p in pieces if p.src != p.dst], source, target)
        return received, time.perf_counter() - start

    def _swap(self, pieces: list[Piece], source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> int:
        sample = next(iter(target.values()))
        outgoing = sorted((p for p in pieces if p.src == self.rank), key=lambda p: p.dst)  # stable: both ends keep the plan's order
        incoming = sorted((p for p in pieces if p.dst == self.rank), key=lambda p: p.src)
        send = [_source(p, source).to(sample.dtype).reshape(-1) for p in outgoing]
        send_sizes, receive_sizes = [0] * self.world, [0] * self.world
        for p, flat in zip(outgoing, send, strict=True):
            send_sizes[p.dst] += flat.numel()
        for p in incoming:
            receive_sizes[p.src] += _target(p, target).numel()
        empty = torch.empty(0, dtype=sample.dtype, device=sample.device)
        received = torch.empty(sum(receive_sizes), dtype=sample.dtype, device=sample.device)
        dist.all_to_all_single(received, torch.cat(send) if send else empty, receive_sizes, send_sizes)
        at = 0
        for p in incoming:
            view = _target(p, target)
            view.copy_(received[at : at + view.numel()].view(view.shape))
            at += view.numel()
        return received.numel() * received.element_size()


def _source(p: Piece, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[p.source].narrow(p.dim, p.source_offset, p.length)


def _target(p: Piece, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[p.target].narrow(p.dim, p.target_offset, p.length)
