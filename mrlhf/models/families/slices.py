"""Rules that say which slices of HF tensors make up a rank's shard of a parameter.

HF's tensors are the common coordinates, each as [out, in] (files with [in, out] are transposed when read and written).
For every rank of a tensor-parallel group a rule lists the slices of HF tensors that a parameter holds, and where.
The import reads these slices, the export writes them back, and the reshard intersects Megatron's with vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TensorSlice:
    """A rectangle of a named tensor: rows (dim 0) or columns (dim 1) `start` to `start + length` of HF tensor `hf`.

    The shard holds it at `offset` along the same dimension.
    """

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
    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        """The slices in the shard of `rank` among `tp` tensor-parallel ranks."""
        ...


@dataclass(frozen=True)
class Copy:
    """Every rank holds the whole tensor of `rows` rows."""

    hf: str
    rows: int

    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        return [TensorSlice(self.hf, 0, 0, self.rows, 0)]


@dataclass(frozen=True)
class RowParallel:
    """Row-parallel linear: the input dimension is sharded."""

    hf: str
    columns: int

    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        part = self.columns // tp
        return [TensorSlice(self.hf, 1, rank * part, part, 0)]


@dataclass(frozen=True)
class Vocab:
    """Rows of a vocabulary padded to a multiple of `multiple`; padding rows belong to no HF tensor."""

    hf: str
    rows: int
    multiple: int

    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        part = -(-self.rows // self.multiple) * self.multiple // tp
        length = min(part, self.rows - rank * part)
        return [TensorSlice(self.hf, 0, rank * part, length, 0)] if length > 0 else []


@dataclass(frozen=True)
class Stacked:
    """Column-parallel linears concatenated by rows, each of `rows` rows: rank r holds [a_r; b_r; ...]."""

    parts: tuple[Ref, ...]
    rows: int

    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        part = self.rows // tp
        return [TensorSlice(ref.hf, 0, ref.start + rank * part, part, i * part) for i, ref in enumerate(self.parts)]


@dataclass(frozen=True)
class GroupedQKV:
    """Megatron's linear_qkv: for every query group its queries, its key, its value."""

    qkv: tuple[Ref, Ref, Ref]
    heads: int
    groups: int
    head_dim: int

    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        d, per_group, local = self.head_dim, self.heads // self.groups, self.groups // tp
        slices, offset = [], 0
        for group in range(rank * local, (rank + 1) * local):
            for ref, rows in zip(self.qkv, (per_group * d, d, d), strict=True):
                slices.append(TensorSlice(ref.hf, 0, ref.start + group * rows, rows, offset))
                offset += rows
        return slices


@dataclass(frozen=True)
class StackedQKV:
    """vLLM's qkv_proj: [q; k; v] of the rank; with more ranks than groups, ranks share a key/value head."""

    qkv: tuple[Ref, Ref, Ref]
    heads: int
    groups: int
    head_dim: int

    def slices(self, tp: int, rank: int) -> list[TensorSlice]:
        d, q_rows = self.head_dim, self.heads // tp * self.head_dim
        kv_rows = max(1, self.groups // tp) * d
        kv_start = rank * kv_rows if self.groups >= tp else rank // (tp // self.groups) * d
        q, k, v = self.qkv
        return [
            TensorSlice(q.hf, 0, q.start + rank * q_rows, q_rows, 0),
            TensorSlice(k.hf, 0, k.start + kv_start, kv_rows, q_rows),
            TensorSlice(v.hf, 0, v.start + kv_start, kv_rows, q_rows + kv_rows),
        ]
