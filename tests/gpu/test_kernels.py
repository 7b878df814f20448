"""Kernels that only a GPU runs, against the same sums written out in fp32: packed attention, the head's log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from models.layers.test_attention import alone

from gpu.places import apart, in_places
from mrlhf.models.layers import attention, logprobs
from mrlhf.models.layers.logprobs import Head, head_logprobs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-8}  # of one number
# query and key heads, width of queries and of values
SHAPES = {
    "one head": (1, 1, 64, 64),
    "grouped": (8, 2, 128, 128),
    "all one key": (4, 1, 32, 32),
    "latent": (4, 4, 192, 128),
}
LIMITS = {
    "plain": {},
    "itself alone": {"window": 1},
    "window": {"window": 17},
    "window beyond all": {"window": 900},
    "softcap": {"softcap": 5.0},
    "both": {"window": 40, "softcap": 5.0},
}
ATTENTION = [(shape, limits, dtype) for shape in SHAPES for limits in LIMITS for dtype in DTYPES]


def packed(q, k, v, lengths: list[int], **limits):
    """The package's attention of one row of samples, [t, n, d]."""
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    segments = attention.Segments(bounds=tuple(bounds), cu_seqlens_q=cu_seqlens, max_seqlen_q=max(lengths))
    rows = (x[:, None] for x in (q, k, v))
    return attention.segment_attention(*rows, segments, scale=None, **limits)[:, 0]


@in_places("shape,limits,dtype", cpu=ATTENTION, gpu=ATTENTION)
def test_packed_attention(place: str, shape: str, limits: str, dtype: str) -> None:
    """Samples of one token, of a tile and one more, and long ones; values and gradients."""
    heads, groups, width, of_values = SHAPES[shape]
    lengths = [1, 128, 129, 7, 300 if place == "cuda" else 30]
    generator, sizes = torch.Generator().manual_seed(0), ((heads, width), (groups, width), (groups, of_values))
    inputs = [torch.randn(sum(lengths), *size, generator=generator).to(DTYPES[dtype]) for size in sizes]
    weights = torch.randn(sum(lengths), heads, of_values, generator=generator).to(DTYPES[dtype])

    def outputs(way, given: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(place, given).requires_grad_() for x in inputs]
        out = way(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weights.to(place, given))]

    def written_out(q, k, v):
        with torch.device(place):
            return alone(q, k, v, lengths, **LIMITS[limits])

    exact = outputs(written_out, torch.float32)
    found = outputs(lambda q, k, v: packed(q, k, v, lengths, **LIMITS[limits]), DTYPES[dtype])
    noise = outputs(written_out, torch.bfloat16) if dtype == "bfloat16" else exact
    for name, ours, rounded, wanted in zip(("output", "of q", "of k", "of v"), found, noise, exact, strict=True):
        if limits == "itself alone" and name in ("of q", "of k"):  # a softmax of one score has no gradient
            assert float(ours.abs().max()) < 0.05, name
        else:
            assert apart([ours], [wanted]) < max(ROUNDING[dtype], 2 * apart([rounded], [wanted])), name


@in_places(
    "dtype,softcap,chunk",
    cpu=[("bfloat16", None, 40), ("bfloat16", 30.0, 5), ("float32", None, 5)],
    gpu=[(dtype, softcap, chunk) for dtype in DTYPES for softcap in (None, 30.0) for chunk in (5, 40)],
)
def test_logprobs_of_large_logits(
    monkeypatch: pytest.MonkeyPatch, place: str, dtype: str, softcap: float | None, chunk: int
) -> None:
    """Logits near 30, as of a trained model, are fp32 whatever the dtype: rounded to bf16 they come in steps of 1/8."""
    tokens, vocabulary, padded, width = 40, 1000, 1024, 256
    monkeypatch.setitem(logprobs.CHUNK_BYTES, place, chunk * padded * 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(DTYPES[dtype])
    weight = (torch.randn(padded, width, generator=generator) * 10 / math.sqrt(width)).to(DTYPES[dtype])
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    keep = (torch.rand(tokens, generator=generator) < 0.7).float()

    exact_hidden, exact_weight = (x.double().requires_grad_() for x in (hidden, weight))
    logits = exact_hidden @ exact_weight[:vocabulary].T
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 0.8
    assert logits.abs().max() > 20
    whole = logits.log_softmax(-1)
    wanted = whole.gather(-1, targets[:, None])[:, 0] * keep
    entropy = -(whole.exp() * whole).sum(-1) * keep
    (wanted.sum() + 0.3 * entropy.sum()).backward()

    ours_hidden, ours_weight = (x.to(place).requires_grad_() for x in (hidden, weight))
    head = Head(ours_weight, vocabulary, softcap=softcap)
    found = head_logprobs(ours_hidden, targets.to(place), head, temperature=0.8, with_entropy=True, keep=keep.to(place))
    (found.logps.sum() + 0.3 * found.entropy.sum()).backward()
    assert found.logps.dtype == torch.float32 and not found.logps[keep.to(place) == 0].any()
    assert (found.logps.cpu() - wanted).abs().max() < 1e-4
    assert (found.entropy.cpu() - entropy).abs().max() < 1e-4
    limit = 1e-5 if dtype == "float32" else 6e-3  # a gradient is rounded to the dtype of what it belongs to
    assert apart([ours_hidden.grad, ours_weight.grad], [exact_hidden.grad, exact_weight.grad]) < limit
