"""Context parallelism: every rank of a group holds a part of each row's tokens; attention swaps tokens for heads (Ulysses).

Legend: S tokens of a whole row, s = S / CP of this rank, b rows, n heads of this tensor-parallel rank, d head size.
Rank c has tokens c s .. (c + 1) s of every row, packed or padded, wherever samples begin and end. Before attention an all-to-all
gives each rank all S tokens of n / CP heads, after it another gives them back: attention itself is that of one rank, packs, windows and left
padding included, and since every rank attends over whole rows, causal masks need no balancing of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class ContextParams(PackedSeqParams):
    """What attention must know of the whole row, packed or not. Its qkv_format is not "thd": tensors keep their row dimension.

    positions_s: place of this rank's tokens in their samples (in their rows where padded), for rotary positions.
    """

    positions_s: torch.Tensor | None = None


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the context-parallel ranks, each of which then computes the same loss from it and counts the same samples.

    Backward sums the equal gradients of all ranks: CP times the gradient of one loss, over CP times the count.
    """
    return collective.all_reduce(x, group=group)


def gather_tokens(x_s: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[..., s] of every context-parallel rank -> [..., S], without gradient."""
    if group.size() == 1:
        return x_s
    parts = [torch.empty_like(x_s, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x_s.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class _AllToAll(torch.autograd.Function):
    """[CP, ...]: piece c goes to rank c. The gradient goes back the same way."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


def tokens_to_heads(x_sbnd: torch.Tensor, group: Any) -> torch.Tensor:
    """[s, b, n, d] -> [S, b, n / CP, d]; fewer (key/value) heads than ranks are repeated, each beside itself, until CP divides them."""
    x_sbnd = x_sbnd if x_sbnd.size(2) % group.size() == 0 else x_sbnd.repeat_interleave(repeats(x_sbnd.size(2), group.size()), dim=2)
    s, b, n, d = x_sbnd.shape
    pieces = x_sbnd.reshape(s, b, group.size(), n // group.size(), d).permute(2, 0, 1, 3, 4)
    return _AllToAll.apply(pieces, group).reshape(s * group.size(), b, n // group.size(), d)


def repeats(heads: int, ranks: int) -> int:
    """How often each of so many key/value heads must stand for the ranks to get equally many."""
    return ranks // math.gcd(heads, ranks)


def heads_to_tokens(x_sbnd: torch.Tensor, group: Any) -> torch.Tensor:
    """[S, b, n / CP, d] -> [s, b, n, d]."""
    s, b, n, d = x_sbnd.shape
    pieces = _AllToAll.apply(x_sbnd.reshape(group.size(), s // group.size(), b, n, d), group)
    return pieces.permute(1, 2, 0, 3, 4).reshape(s // group.size(), b, n * group.size(), d)
