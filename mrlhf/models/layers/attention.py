"""Attention: the core, causal within segments, for Megatron's layer specs; rotary positions of each layer.

Shapes: s tokens of a row, b rows, t = b s tokens of the flattened rows [b, s], n query heads and g key/value heads on
this rank, d head size; in one call of a kernel N segments of L tokens.
  query [s, b, n, d], key/value [s, b, g, d] -> [s, b, n * d]

Every layout of a batch is segments of the flattened rows, one after the other: the samples of a pack; rows padded on
the right (causality hides the padding); padding and sample of a row padded on the left. No mask describes them, and no
tensor of L x L exists. With a `window` a token sees itself and window - 1 tokens before it. A `softcap` turns every
score into cap * tanh(score / cap). The head size of values may be smaller than that of queries and keys.
  CUDA in half precision   torch's varlen kernel, windows included
  otherwise                segments of similar length share a call of torch's attention, for windows a call for each
                           block of queries. (One block mask over a whole pack costs 1.5 to 4 times as much.)
  with a softcap           which no kernel of torch has: block by block of queries, computed again in backward

Megatron computes one table of angles a forward pass and hands it to all layers. Here the table holds the angles of
every kind of rotary positions in the model, [s, kinds, 1, d], at the positions of this rank's tokens, and each layer's
attention takes its own kind, or none. So layers need no lengths for it, and the host waits for no device. Kinds and
their frequencies: models/families/rope_frequencies.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from mrlhf.parallel.context import heads_to_tokens, tokens_to_heads

BLOCK = 512  # queries of a call, with a window or a softcap
SCORE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # with a softcap: fp32 scores of a call


@dataclass
class Segments(PackedSeqParams):
    """Segment i is the tokens bounds[i] .. bounds[i + 1] of the flattened whole rows (under context parallelism too).

    Megatron hands it to every layer. Its qkv_format is not "thd", with which Megatron would drop a dimension and copy
    lengths to the host for rotary positions. bounds are on the host, cu_seqlens_q has the same numbers on the device.
    positions_s: places of this rank's tokens in their samples; in their rows if there are several rows, which share
    them (rotary positions matter by their differences alone).
    """

    bounds: tuple[int, ...] = ()
    positions_s: torch.Tensor | None = None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)  # what `mask` has made, for all layers

    @functools.cached_property
    def groups(self) -> tuple[list[tuple[torch.Tensor, int, int]], torch.Tensor]:
        return _by_length(self.bounds, self.cu_seqlens_q.device)

    def mask(self, queries: slice, keys: slice, window: int, dtype: torch.dtype) -> torch.Tensor:
        """[queries, keys] for torch's attention: 0 where a query may see a key, else -inf. Most blocks share one."""
        key = queries.start - keys.start, queries.stop - keys.start, window, dtype
        if key not in self.masks:
            hidden = ~_visible(queries, keys, window, self.cu_seqlens_q.device)
            self.masks[key] = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)
        return self.masks[key]


def segment_attention(q_sbnd: torch.Tensor, k_sbgd: torch.Tensor, v_sbgd: torch.Tensor, segments: Segments, *,
                      scale: float | None, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    """Causal attention within each segment: [s, b, n, d]. The segments must cover all tokens."""
    (s, b, n), width, bounds = q_sbnd.shape[:3], v_sbgd.size(-1), segments.bounds
    assert bounds[-1] == s * b, (bounds[-1], q_sbnd.shape)
    # for backward a view would keep all of what it is a part of: values the whole output of linear_qkv
    rows = [x.contiguous().transpose(0, 1) for x in (q_sbnd, k_sbgd, v_sbgd)]
    if q_sbnd.is_cuda and q_sbnd.dtype != torch.float32 and softcap is None:
        q, k, v = (x.flatten(0, 1) for x in rows)
        out = _varlen(q, k, v, segments, scale=scale, window=window)
        return out.view(b, s, n, width).transpose(0, 1)
    limits: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    lengths = {end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)}
    if len(lengths) == 1:
        q, k, v = (x.reshape(-1, *lengths, *x.shape[2:]).transpose(1, 2) for x in rows)
        return _attend(q, k, v, segments, **limits).transpose(1, 2).reshape(b, s, n, width).transpose(0, 1)
    flat, pieces = [x.flatten(0, 1) for x in rows], []
    groups, place_T = segments.groups
    for index_NL, count, length in groups:
        q, k, v = (x.index_select(0, index_NL).view(count, length, *x.shape[1:]).transpose(1, 2) for x in flat)
        out = _attend(q, k, v, segments, **limits)
        pieces.append(out.transpose(1, 2).reshape(count * length, n, width))
    return torch.cat(pieces).index_select(0, place_T).view(b, s, n, width).transpose(0, 1)


def _varlen(q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor, segments: Segments, *, scale: float | None,
            window: int | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    scale, width = q_tnd.size(-1) ** -0.5 if scale is None else scale, -(-q_tnd.size(-1) // 8) * 8
    q, k, v = (_widened(x, width) for x in (q_tnd, k_tgd, v_tgd))  # the kernel wants one width, a multiple of 8
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if q.size(1) != k.size(1):
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    cu_seqlens, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)[..., : v_tgd.size(-1)]


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.size(-1) == width else F.pad(x, (0, width - x.size(-1)))


def _attend(q_NnLd: torch.Tensor, k_NgLd: torch.Tensor, v_NgLd: torch.Tensor, segments: Segments, *,
            scale: float | None, window: int | None, softcap: float | None) -> torch.Tensor:
    length, width = q_NnLd.size(2), v_NgLd.size(-1)
    scale = q_NnLd.size(-1) ** -0.5 if scale is None else scale
    window = None if window is None or window >= length else window
    if softcap is not None:
        return _SoftcapAttention.apply(q_NnLd, k_NgLd, v_NgLd, scale, window, softcap)
    options: dict[str, Any] = {"scale": scale}
    k, v = k_NgLd, _widened(v_NgLd, q_NnLd.size(-1))  # with values of another width torch keeps all scores
    if q_NnLd.size(1) != k.size(1):
        if k.is_cuda:  # fp32: the kernel without scores knows no groups
            k, v = (x.repeat_interleave(q_NnLd.size(1) // x.size(1), dim=1) for x in (k, v))
        else:
            options["enable_gqa"] = True
    if window is None:
        return F.scaled_dot_product_attention(q_NnLd, k, v, is_causal=True, **options)[..., :width]
    pieces = []
    for queries, keys in _blocks(length, BLOCK, window):
        part = (q_NnLd[:, :, queries], k[:, :, keys], v[:, :, keys])
        options["attn_mask"] = segments.mask(queries, keys, window, k.dtype)
        pieces.append(F.scaled_dot_product_attention(*part, **options))
    return torch.cat(pieces, dim=2)[..., :width]


def _blocks(length: int, size: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys, among them all that one of the queries may see), `size` queries at a time."""
    for start in range(0, length, size):
        end, first = min(start + size, length), 0 if window is None else max(0, start - window + 1)
        yield slice(start, end), slice(first - first % 8, end)  # CUDA copies a mask whose rows are not aligned


def _visible(queries: slice, keys: slice, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys], True where a query may see a key."""
    ahead = torch.arange(queries.start, queries.stop, device=device)[:, None]
    ahead = ahead - torch.arange(keys.start, keys.stop, device=device)
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


class _SoftcapAttention(torch.autograd.Function):
    """Keeps queries, keys and values alone: backward computes the scores again, block by block."""

    @staticmethod
    def forward(ctx, q, k, v, scale, window, softcap):
        ctx.save_for_backward(q, k, v)
        size = SCORE_BYTES[q.device.type] // (4 * q.size(0) * q.size(1) * q.size(2))
        ctx.scale, ctx.window, ctx.softcap = scale, window, softcap
        ctx.blocks = list(_blocks(q.size(2), min(BLOCK, max(16, size)), window))
        pieces = []
        for queries, keys in ctx.blocks:
            mask = _visible(queries, keys, window, q.device)
            pieces.append(_capped(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, scale, softcap))
        return torch.cat(pieces, dim=2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over the blocks
        for queries, keys in ctx.blocks:
            mask = _visible(queries, keys, ctx.window, q.device)
            with torch.enable_grad():
                part = [x[:, :, at].detach().requires_grad_() for x, at in ((q, queries), (k, keys), (v, keys))]
                out = _capped(*part, mask, ctx.scale, ctx.softcap)
            of_q, of_k, of_v = torch.autograd.grad(out, part, grad[:, :, queries])
            grad_q[:, :, queries] = of_q
            grad_k[:, :, keys] += of_k
            grad_v[:, :, keys] += of_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _capped(q_NnQd: torch.Tensor, k_NgKd: torch.Tensor, v_NgKd: torch.Tensor, mask_QK: torch.Tensor, scale: float,
            softcap: float) -> torch.Tensor:
    """As transformers: softmax in fp32, weights in the dtype of the values. A group's query heads share a product."""
    groups, shape = k_NgKd.size(1), (*q_NnQd.shape[:3], k_NgKd.size(2))
    scores = q_NnQd.unflatten(1, (groups, -1)).flatten(2, 3) @ k_NgKd.transpose(2, 3)
    scores = (torch.tanh(scores * (scale / softcap)) * softcap).view(shape).masked_fill(~mask_QK, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v_NgKd.dtype)
    return (weights.unflatten(1, (groups, -1)).flatten(2, 3) @ v_NgKd).view(*shape[:3], -1)


def _by_length(
    bounds: tuple[int, ...], device: torch.device
) -> tuple[list[tuple[torch.Tensor, int, int]], torch.Tensor]:
    """Segments whose lengths round up to one power of two share a call, padded on the right: log2(longest) calls
    instead of one a segment.

    Returns [(token of each padded place, segments, padded length)] and the place of each token among all padded places.
    Padding repeats a segment's last token: causal attention hides it, and no output is read from its places.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        by_length.setdefault((end - start - 1).bit_length(), []).append((start, end))
    groups, place_T, used = [], torch.empty(bounds[-1], dtype=torch.long), 0
    for segments in by_length.values():
        starts, ends = (torch.tensor(x) for x in zip(*segments, strict=True))
        length = int((ends - starts).max())
        index_NL = torch.minimum(starts[:, None] + torch.arange(length), ends[:, None] - 1)
        for row, (start, end) in enumerate(segments):
            place_T[start:end] = torch.arange(used + row * length, used + row * length + end - start)
        groups.append((index_NL.reshape(-1).to(device, non_blocking=True), len(segments), length))
        used += len(segments) * length
    return groups, place_T.to(device, non_blocking=True)


class CoreAttention(MegatronModule):
    """Replaces Megatron's DotProductAttention, which materialises s x s scores and refuses packed input."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
                 cp_comm_type=None, pg_collection=None, window: int | None = None, softcap: float | None = None, **_):
        super().__init__(config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0, "no attention dropout in RLHF"
        self.scale, self.window, self.softcap = softmax_scale, window, softcap
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.tp_group = pg_collection.tp  # sharded_state_dict would take it from Megatron's globals

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None, **_):
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n * d]. packed_seq_params: `Segments`."""
        assert isinstance(packed_seq_params, Segments) and attention_mask is None, "segments say what a token sees"
        limits = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        if self.context_group is not None:
            query, key, value = (tokens_to_heads(x, self.context_group) for x in (query, key, value))
        out_sbnd = segment_attention(query, key, value, packed_seq_params, **limits)
        if self.context_group is not None:
            out_sbnd = heads_to_tokens(out_sbnd, self.context_group)
        return out_sbnd.flatten(2)


class RotaryTable(RotaryEmbedding):
    """Replaces GPTModel.rotary_pos_emb. inv_freq_KF: radians a token, for every kind and pair of dimensions.

    interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of (0, F), (1, F + 1), ...
    """

    def __init__(self, inv_freq_KF: torch.Tensor, *, interleaved: bool) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq, self.interleaved = inv_freq_KF, interleaved

    def get_rotary_seq_len(self, inference_context, transformer, transformer_input, transformer_config,
                           packed_seq_params=None, **_):
        """The positions: Megatron passes on to `forward` what this returns."""
        return packed_seq_params.positions_s

    def forward(self, positions_s: torch.Tensor, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        """Angles [s, kinds, 1, rotated dimensions]."""
        angles_SKF = positions_s.float()[:, None, None] * self.inv_freq
        angles_SK1F = angles_SKF[:, :, None]
        return angles_SK1F.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles_SK1F,) * 2, dim=-1)


class LayerRope:
    """Mixin for Megatron's attention classes. rope: the layer's kind of rotary positions; None: none."""

    def __init__(self, *args, rope: int | None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rope = rope

    def forward(self, hidden_states, attention_mask, rotary_pos_emb=None, **kwargs):
        if rotary_pos_emb is not None:
            rotary_pos_emb = None if self.rope is None else rotary_pos_emb[:, self.rope : self.rope + 1]
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs)


class RotaryAttention(LayerRope, SelfAttention):
    """Megatron's self-attention with the rotary positions of its layer."""
