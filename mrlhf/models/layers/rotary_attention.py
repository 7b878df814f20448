"""Self-attention whose rotary positions differ from layer to layer, for Megatron's GPTModel.

Megatron computes one table of angles a forward pass and hands it to all layers. Here the table holds the angles of
every kind of rotary positions in the model, [s, kinds, 1, d], and each layer's attention takes its own kind, or none.
Kinds and their frequencies: models/families/rope_frequencies.py.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention

from mrlhf.parallel.context import ContextParams


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
