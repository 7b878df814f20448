"""Context parallelism: each rank of a group holds a part of every row's tokens; attention swaps tokens for heads
(Ulysses).

Legend: S tokens of a whole row, s = S / CP of this rank, b rows, n heads of this tensor-parallel rank, d head size.
Rank c has tokens c s .. (c + 1) s of every row, packed or padded, wherever samples begin and end. Before attention an
all-to-all gives each rank all S tokens of n / CP heads; after attention another all-to-all swaps back. In between
attention runs as on one rank, with packs, windows and left padding. Since every rank attends over whole rows, causal
masks need no balancing of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the context-parallel ranks, each of which then computes the same loss from it and counts the same
    samples.

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
    """[CP, ...]: part c goes to rank c; the gradient takes the same way back."""

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
    """[s, b, n, d] -> [S, b, n / CP, d]. Each key/value head is repeated until CP divides their number."""
    if x_sbnd.size(2) % group.size():
        x_sbnd = x_sbnd.repeat_interleave(head_repeats(x_sbnd.size(2), group.size()), dim=2)
    s, b, n, d = x_sbnd.shape
    pieces = x_sbnd.reshape(s, b, group.size(), n // group.size(), d).permute(2, 0, 1, 3, 4)
    return _AllToAll.apply(pieces, group).reshape(s * group.size(), b, n // group.size(), d)


def head_repeats(heads: int, ranks: int) -> int:
    """How often each head must be repeated for all ranks to get equally many."""
    return ranks // math.gcd(heads, ranks)


def heads_to_tokens(x_sbnd: torch.Tensor, group: Any) -> torch.Tensor:
    """[S, b, n / CP, d] -> [s, b, n, d]."""
    s, b, n, d = x_sbnd.shape
    pieces = _AllToAll.apply(x_sbnd.reshape(group.size(), s // group.size(), b, n, d), group)
    return pieces.permute(1, 2, 0, 3, 4).reshape(s // group.size(), b, n * group.size(), d)
