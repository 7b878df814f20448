"""Multi-head latent attention under tensor and sequence parallelism.

Megatron's MLASelfAttention (0.16.1) cannot be constructed without Transformer Engine: it asks whether its layers are of
a mocked class. With that mended it shards the projections to the latent vectors over the ranks, gathers after each, and
loses part of a gradient: all heads share a part of the keys, and the other ranks' heads do not reach it. Under TP 2,
with and without sequence parallelism, the gradient of its linear_kv_down_proj was off by 1.2 of at most 3.2. Here every
rank holds these small projections whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_config import TransformerConfig

from mrlhf.models.layers.attention import LayerRope
from mrlhf.models.layers.norms import Norm


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the group's ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class LatentAttention(LayerRope, Attention):
    """Queries and keys [s, b, n, rope + nope], values [s, b, n, v] of this rank's n heads; the rotated dimensions come
    first.

    nope_dim, rope_dim, kv_rank, q_rank: see models/families/spec.py `Latent`. key_scale multiplies the rotated part of
    the keys (yarn).
    """

    def __init__(self, config: TransformerConfig, *args: Any, nope_dim: int, rope_dim: int, kv_rank: int,
                 q_rank: int | None, key_scale: float, scale: float, **kwargs: Any) -> None:
        super().__init__(config, *args, attention_type="self", **kwargs)
        self.nope_dim, self.rope_dim, self.kv_rank, self.key_scale = nope_dim, rope_dim, kv_rank, key_scale
        self.core_attention.scale = scale
        h, heads, v_dim = config.hidden_size, config.num_attention_heads, config.kv_channels

        def down(rows: int) -> torch.nn.Linear:
            linear = torch.nn.utils.skip_init(torch.nn.Linear, h, rows, bias=False, dtype=config.params_dtype)
            linear.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            return linear

        def up(columns: int, rows: int) -> ColumnParallelLinear:
            options = {"bias": False, "gather_output": False, "tp_group": self.tp_group}
            return ColumnParallelLinear(columns, rows, config=config, init_method=config.init_method, **options)

        if q_rank is None:
            self.linear_q_down, self.q_layernorm = torch.nn.Identity(), torch.nn.Identity()
        else:
            self.linear_q_down, self.q_layernorm = down(q_rank), Norm(config, q_rank, config.layernorm_epsilon)
        self.linear_q_up = up(h if q_rank is None else q_rank, heads * (nope_dim + rope_dim))
        self.k_layernorm = None  # Megatron reads it
        self.linear_kv_down = down(kv_rank + rope_dim)
        self.kv_layernorm = Norm(config, kv_rank, config.layernorm_epsilon)
        self.linear_kv_up = up(kv_rank, heads * (nope_dim + v_dim))

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, **_):
        n = self.num_attention_heads_per_partition
        # linear_q_up is column-parallel and gathers the sequence
        q_SBX, _ = self.linear_q_up(self.q_layernorm(self.linear_q_down(hidden_states)))
        latent_SBX, key_SBX = self.linear_kv_down(hidden_states).split([self.kv_rank, self.rope_dim], dim=-1)
        kv_SBX, _ = self.linear_kv_up(self.kv_layernorm(latent_SBX))
        if self.config.sequence_parallel:
            # backward sums over the ranks too
            key_SBX = gather_from_sequence_parallel_region(key_SBX, group=self.tp_group)
        elif self.tp_group.size() > 1:
            key_SBX = _SumGradient.apply(key_SBX, self.tp_group)
        q_nope, q_rope = q_SBX.unflatten(-1, (n, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        k_nope, value = kv_SBX.unflatten(-1, (n, -1)).split([self.nope_dim, self.config.kv_channels], dim=-1)
        k_rope = (key_SBX if self.key_scale == 1 else key_SBX * self.key_scale)[:, :, None].expand(-1, -1, n, -1)
        return torch.cat((q_rope, q_nope), -1), torch.cat((k_rope, k_nope), -1), value
