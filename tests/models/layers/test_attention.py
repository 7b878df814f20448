"""Attention over segments is the attention of each segment alone, in value and gradient, whatever stands around it,
and keeps nothing of the size of a segment squared.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrlhf.models.layers import attention
from mrlhf.models.layers.attention import Segments, segment_attention


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


def segments_of(bounds: list[int]) -> Segments:
    lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return Segments(bounds=tuple(bounds), cu_seqlens_q=cu_seqlens, max_seqlen_q=max(lengths))


def sizes(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks for a short segment as for a long one."""
    monkeypatch.setattr(attention, "BLOCK", 7)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([(4, 4), (4, 2), (2, 1)]),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([None, 1.5]),
    st.sampled_from([8, 5]),
)
def test_each_segment_is_as_if_alone(
    lengths: list[int], heads: tuple[int, int], window: int | None, softcap: float | None, width: int
) -> None:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(total, 1, n, d, generator=generator, requires_grad=True)
        for n, d in ((heads[0], 8), (heads[1], 8), (heads[1], width))
    )
    weights = torch.randn(total, 1, heads[0], width, generator=generator)
    ours = segment_attention(q, k, v, segments_of(sizes(lengths)), scale=None, window=window, softcap=softcap)
    theirs = alone(*(x[:, 0] for x in (q, k, v)), lengths, window=window, softcap=softcap)[:, None]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bounds", [[0, 9, 18], [0, 4, 9, 18], [0, 2, 9, 9 + 8, 18]])
def test_rows_and_their_padding_are_segments_of_the_flattened_rows(bounds: list[int], window: int | None) -> None:
    """Two rows of nine tokens: whole, one of them padded on the left, both."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, n, 8, generator=generator) for n in (4, 2, 2))
    ours = segment_attention(q, k, v, segments_of(bounds), scale=None, window=window)
    lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    theirs = alone(*(x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)), lengths, window=window)
    torch.testing.assert_close(ours.transpose(0, 1).flatten(0, 1), theirs, rtol=1e-5, atol=1e-5)


def test_segments_must_cover_all_tokens() -> None:
    q = torch.zeros(5, 1, 1, 8)
    with pytest.raises(AssertionError):
        segment_attention(q, q, q, segments_of([0, 3]), scale=None)


def kept_bytes(length: int, heads: tuple[int, int, int], widths: tuple[int, int], **limits: object) -> int:
    """What autograd keeps of attention over one row with some padding on its left."""
    shapes = [(length, 1, n, d) for n, d in zip(heads, (widths[0], *widths), strict=True)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        segment_attention(q, k, v, segments_of([0, 48, length]), scale=None, **limits)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("widths", [(8, 8), (8, 4)], ids=["one width", "narrow values"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2)], ids=["heads", "groups"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 5.0), (100, 5.0)])
def test_memory_grows_with_the_tokens_not_with_their_square(
    window: int | None, softcap: float | None, heads: tuple[int, int, int], widths: tuple[int, int]
) -> None:
    short, long = (kept_bytes(n, heads, widths, window=window, softcap=softcap) for n in (1024, 2048))
    assert long <= 2.1 * short


def varlen_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch's varlen attention as documented, for causal windows: one width of heads, groups only if asked for."""
    assert q.size(-1) == k.size(-1) == v.size(-1) and q.size(-1) % 8 == 0
    assert enable_gqa or q.size(1) == k.size(1)
    assert torch.equal(cu_seq_q, cu_seq_k) and window_size[1] == 0 and max_q == max_k == int(cu_seq_q.diff().max())
    window = None if window_size[0] == -1 else window_size[0] + 1
    lengths = cu_seq_q.diff().tolist()
    return alone(q * scale * q.size(-1) ** 0.5, k, v, lengths, window=window)


def without_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """Of torch 2.11."""
    return varlen_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [varlen_reference, without_groups])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["heads", "groups"])
@pytest.mark.parametrize("widths", [(8, 8), (12, 12), (16, 5)], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_for_cuda_is_asked_for_the_same(
    kernel: object, heads: tuple[int, int], widths: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    generator = torch.Generator().manual_seed(0)
    shapes = ((18, heads[0], widths[0]), (18, heads[1], widths[0]), (18, heads[1], widths[1]))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    for scale in (None, 0.3):
        ours = attention._varlen(q, k, v, segments_of([0, 7, 18]), scale=scale, window=window)
        factor = 1.0 if scale is None else scale * widths[0] ** 0.5
        torch.testing.assert_close(ours, alone(q * factor, k, v, [7, 11], window=window), rtol=1e-5, atol=1e-5)
