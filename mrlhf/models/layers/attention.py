"""Attention: the core, causal, dense or packed (THD), for Megatron's layer specs; rotary positions of each layer.

Shapes: s tokens, b rows, t packed tokens, n query heads and g key/value heads on this rank, d head size.
  dense   query [s, b, n, d], key/value [s, b, g, d] -> [s, b, n*d]
  packed  query [t, n, d],    key/value [t, g, d]    -> [t, n, d]; sample i is cu_seqlens[i]:cu_seqlens[i+1]
The head size of values may differ from that of queries and keys (latent attention); the output has the values' head
size. With a `window` a token sees itself and window - 1 tokens before it. A `softcap` turns every score into cap *
tanh(score / cap); no kernel of torch has it, so the scores are then built whole, s x s for each head. Packed attention
on CUDA in half precision uses torch's varlen kernel. On CPU, in fp32 and with a softcap, samples of similar length
share a call. (One block mask over the whole pack costs 1.5 to 4 times as much as one call a sample.)

Megatron computes one table of angles a forward pass and hands it to all layers. Here the table holds the angles of
every kind of rotary positions in the model, [s, kinds, 1, d], and each layer's attention takes its own kind, or none.
Kinds and their frequencies: models/families/rope_frequencies.py.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from mrlhf.parallel.context import ContextParams, heads_to_tokens, tokens_to_heads


def _visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[s, s], True where row (query) may see column (key)."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril() & ones.triu(1 - window)


def _attend(q_bnsd: torch.Tensor, k_bgsd: torch.Tensor, v_bgsd: torch.Tensor, *, scale: float | None,
            mask: torch.Tensor | None = None, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    """mask: [b, 1, s, s], True where a query may see a key, already causal; None: plain causal."""
    s = q_bnsd.size(2)
    if window is not None and window < s:
        band = _visible(s, window, q_bnsd.device)
        mask = band if mask is None else mask & band
    if softcap is None:
        grouped = q_bnsd.size(1) != k_bgsd.size(1)
        options = {"attn_mask": mask, "is_causal": mask is None, "scale": scale, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(q_bnsd, k_bgsd, v_bgsd, **options)
    repeat = q_bnsd.size(1) // k_bgsd.size(1)
    k_bnsd, v_bnsd = (x.repeat_interleave(repeat, dim=1) for x in (k_bgsd, v_bgsd))
    scores = q_bnsd @ k_bnsd.transpose(2, 3) * (q_bnsd.size(3) ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    # the lowest finite number, as in transformers: a padding row that sees nothing must not become nan
    hidden = ~(_visible(s, None, q_bnsd.device) if mask is None else mask)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q_bnsd.dtype) @ v_bnsd


def packed_attention(
    q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    scale: float | None, *, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """Causal attention within each sample. The samples must cover all t tokens."""
    if q_tnd.is_cuda and q_tnd.dtype != torch.float32 and softcap is None:
        from torch.nn.attention.varlen import varlen_attn

        width = v_tgd.size(-1)
        return varlen_attn(
            q_tnd,
            k_tgd,
            F.pad(v_tgd, (0, q_tnd.size(-1) - width)),  # the kernel wants one width
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q_tnd.size(1) != k_tgd.size(1),
        )[..., :width]
    cu = tuple(cu_seqlens.tolist())
    assert cu[-1] == q_tnd.size(0), (cu[-1], q_tnd.shape)
    groups, place_T = _by_length(cu, q_tnd.device)
    pieces = []
    for index_NL, count, length in groups:
        rows = (x.index_select(0, index_NL).view(count, length, *x.shape[1:]) for x in (q_tnd, k_tgd, v_tgd))
        q, k, v = (x.transpose(1, 2) for x in rows)
        out = _attend(q, k, v, scale=scale, window=window, softcap=softcap)
        pieces.append(out.transpose(1, 2).reshape(count * length, q_tnd.size(1), v_tgd.size(2)))
    return torch.cat(pieces).index_select(0, place_T)


@functools.lru_cache(maxsize=16)
def _by_length(cu: tuple[int, ...], device: torch.device) -> tuple[list[tuple[torch.Tensor, int, int]], torch.Tensor]:
    """Samples whose lengths round up to one power of two share a call, padded on the right: log2(longest) calls instead
    of one a sample.

    Returns [(token of each padded place, samples, padded length)] and the place of each token among all padded places.
    Padding repeats a sample's last token: causal attention hides it, and no output is read from its places.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in zip(cu[:-1], cu[1:], strict=True):
        if end > start:
            by_length.setdefault((end - start - 1).bit_length(), []).append((start, end))
    groups, place_T, used = [], torch.empty(cu[-1], dtype=torch.long), 0
    for samples in by_length.values():
        starts, ends = (torch.tensor(x) for x in zip(*samples, strict=True))
        length = int((ends - starts).max())
        index_NL = torch.minimum(starts[:, None] + torch.arange(length), ends[:, None] - 1)
        for row, (start, end) in enumerate(samples):
            place_T[start:end] = torch.arange(used + row * length, used + row * length + end - start)
        groups.append((index_NL.reshape(-1).to(device), len(samples), length))
        used += len(samples) * length
    return groups, place_T.to(device)


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
        """attention_mask: [b, 1, s, s], True where a query may not see a key (Megatron's sense); None: plain causal."""
        if self.context_group is not None:
            assert packed_seq_params is not None, "context parallelism needs the whole rows' ContextParams"
            query, key, value = (tokens_to_heads(x, self.context_group) for x in (query, key, value))
            if packed_seq_params.cu_seqlens_q is None:
                out_sbx = self._whole_rows(query, key, value, attention_mask, None)
            else:
                out_sbx = self._whole_rows(query.squeeze(1), key.squeeze(1), value.squeeze(1), None, packed_seq_params)
            out_sbnd = heads_to_tokens(out_sbx.view(*query.shape[:-1], value.size(-1)), self.context_group)
            return out_sbnd.reshape(out_sbnd.size(0), out_sbnd.size(1), -1)
        return self._whole_rows(query, key, value, attention_mask, packed_seq_params)

    def _whole_rows(self, query, key, value, attention_mask, packed_seq_params):
        limits = {"window": self.window, "softcap": self.softcap}
        if packed_seq_params is not None:
            cu_seqlens, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            return packed_attention(query, key, value, cu_seqlens, longest, self.scale, **limits)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if attention_mask is None else ~attention_mask
        out_sbnd = _attend(q, k, v, scale=self.scale, mask=mask, **limits).permute(2, 0, 1, 3)
        return out_sbnd.reshape(out_sbnd.size(0), out_sbnd.size(1), -1)


class RotaryTable(RotaryEmbedding):
    """Replaces GPTModel.rotary_pos_emb. inv_freq_KF: radians a token, for every kind and pair of dimensions.

    interleaved: the pairs are dimensions (0, 1), (2, 3), ... instead of (0, F), (1, F + 1), ...
    """

    def __init__(self, inv_freq_KF: torch.Tensor, *, interleaved: bool) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq, self.interleaved = inv_freq_KF, interleaved

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        """Angles [s, kinds, 1, rotated dimensions]."""
        position_S = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
        angles_SKF = position_S[:, None, None] * self.inv_freq
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
            packed = kwargs.get("packed_seq_params")
            if rotary_pos_emb is not None and isinstance(packed, ContextParams):
                rotary_pos_emb = rotary_pos_emb.index_select(0, packed.positions_s)
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs)


class RotaryAttention(LayerRope, SelfAttention):
    """Megatron's self-attention with the rotary positions of its layer."""
