"""The words of a weight map: how a parameter's shard is made of rows or columns of HF tensors.

HF's tensors are the common coordinates, every one of them as [out, in] (files that hold [in, out] are
transposed on the way in and out). A rule says, for every rank of a tensor-parallel group, which blocks of
which HF tensors a parameter holds and where. The same rules serve the import (read the blocks), the export
(write them back) and the reshard (intersect Megatron's blocks with vLLM's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Block:
    """`length` rows (dim 0) or columns (dim 1) of HF tensor `hf` from `start` on stand at `offset` of the shard."""

    hf: str
    dim: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Ref:
    """Rows of HF tensor `hf` from `start` on: the place of a matrix that HF keeps inside a fused one."""

    hf: str
    start: int = 0


class Rule(Protocol):
    def blocks(self, tp: int, rank: int) -> list[Block]:
        """Of the shard of `rank` among `tp`."""
        ...


@dataclass(frozen=True)
class Copy:
    """Every rank holds the whole tensor of `rows` rows."""

    hf: str
    rows: int

    def blocks(self, tp: int, rank: int) -> list[Block]:
        return [Block(self.hf, 0, 0, self.rows, 0)]


@dataclass(frozen=True)
class Columns:
    """Row-parallel linear: the input dimension is split."""

    hf: str
    columns: int

    def blocks(self, tp: int, rank: int) -> list[Block]:
        part = self.columns // tp
        return [Block(self.hf, 1, rank * part, part, 0)]


@dataclass(frozen=True)
class Vocab:
    """Rows of a vocabulary padded to `multiple` x n; padding rows belong to no HF tensor and stay as they are."""

    hf: str
    rows: int
    multiple: int

    def blocks(self, tp: int, rank: int) -> list[Block]:
        part = -(-self.rows // self.multiple) * self.multiple // tp
        length = min(part, self.rows - rank * part)
        return [Block(self.hf, 0, rank * part, length, 0)] if length > 0 else []


@dataclass(frozen=True)
class Stacked:
    """Column-parallel linears over one another: rank r holds [a_r; b_r; ...], each of `rows` rows in all and split by rows."""

    parts: tuple[Ref, ...]
    rows: int

    def blocks(self, tp: int, rank: int) -> list[Block]:
        part = self.rows // tp
        return [Block(ref.hf, 0, ref.start + rank * part, part, i * part) for i, ref in enumerate(self.parts)]


@dataclass(frozen=True)
class GroupedQKV:
    """Megatron's linear_qkv: for every query group its queries, its key, its value."""

    qkv: tuple[Ref, Ref, Ref]
    heads: int
    groups: int
    head_dim: int

    def blocks(self, tp: int, rank: int) -> list[Block]:
        d, per_group, local = self.head_dim, self.heads // self.groups, self.groups // tp
        q, k, v = self.qkv
        found = []
        for i in range(local):
            group, at = rank * local + i, i * (per_group + 2) * d
            found += [
                Block(q.hf, 0, q.start + group * per_group * d, per_group * d, at),
                Block(k.hf, 0, k.start + group * d, d, at + per_group * d),
                Block(v.hf, 0, v.start + group * d, d, at + (per_group + 1) * d),
            ]
        return found


@dataclass(frozen=True)
class StackedQKV:
    """vLLM's qkv_proj: [all q of the rank; all k; all v]; key/value heads are replicated when tp exceeds them."""

    qkv: tuple[Ref, Ref, Ref]
    heads: int
    groups: int
    head_dim: int

    def blocks(self, tp: int, rank: int) -> list[Block]:
        d, q_rows = self.head_dim, self.heads // tp * self.head_dim
        kv_rows = max(1, self.groups // tp) * d
        kv_start = rank * kv_rows if self.groups >= tp else rank // (tp // self.groups) * d
        q, k, v = self.qkv
        return [
            Block(q.hf, 0, q.start + rank * q_rows, q_rows, 0),
            Block(k.hf, 0, k.start + kv_start, kv_rows, q_rows),
            Block(v.hf, 0, v.start + kv_start, kv_rows, q_rows + kv_rows),
        ]
