"""Packed attention is the attention of each sample alone, in value and gradient, whatever stands around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.models.layers.attention import packed_attention


def alone(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d), causal) v of each sample, written out."""
    pieces, heads = [], q.size(1) // k.size(1)
    for part_q, part_k, part_v in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("snd,tnd->nst", part_q, part_k.repeat_interleave(heads, 1)) / q.size(-1) ** 0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).tril(-window), float("-inf"))
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
        pieces.append(torch.einsum("nst,tnd->snd", scores.softmax(-1), part_v.repeat_interleave(heads, 1)))
    return torch.cat(pieces)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([None, 1.5]),
)
def test_packed_equals_each_sample_alone(
    lengths: list[int], heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(total, n, 8, generator=generator, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    weights = torch.randn(total, heads[0], 8, generator=generator)
    ours = packed_attention(q, k, v, cu, max(lengths), None, window=window, softcap=softcap)
    theirs = alone(q, k, v, lengths, window=window, softcap=softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_samples_must_cover_the_pack() -> None:
    q = torch.zeros(5, 1, 8)
    with pytest.raises(AssertionError):
        packed_attention(q, q, q, torch.tensor([0, 3], dtype=torch.int32), 3, None)
