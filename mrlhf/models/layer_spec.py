"""A layer of a ModelSpec -> megatron-core's ModuleSpec of its TransformerLayer."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mrlhf.models.families.spec import Latent, Layer, ModelSpec
from mrlhf.models.layers.attention import CoreAttention, RotaryAttention
from mrlhf.models.layers.latent import LatentAttention
from mrlhf.models.layers.norms import Norm, QKNorm, ResidualAdd, WholeQKNorm
from mrlhf.models.layers.router import MoE, Router


class _RowWithBias(RowParallelLinear):
    """These three fix the bias of attention's projections, which Megatron ties to the MLP's."""

    def __init__(self, *args, bias, **kwargs) -> None:
        super().__init__(*args, bias=True, **kwargs)


class _RowWithoutBias(RowParallelLinear):
    def __init__(self, *args, bias, **kwargs) -> None:
        super().__init__(*args, bias=False, **kwargs)


class _ColumnWithoutBias(ColumnParallelLinear):
    def __init__(self, *args, bias, **kwargs) -> None:
        super().__init__(*args, bias=False, **kwargs)


def layer_spec(
    spec: ModelSpec, config: TransformerConfig, layer: Layer, collection: ProcessGroupCollection
) -> ModuleSpec:
    def qk_norm(heads: int) -> ModuleSpec | type:
        if spec.qk_norm == "all":
            return ModuleSpec(module=WholeQKNorm, params={"heads": heads, "group": collection.tp})
        return QKNorm if spec.qk_norm == "head" else IdentityOp

    def residual_add() -> Any:
        if not spec.post_norm and spec.residual_scale == 1.0:
            return get_bias_dropout_add
        params = {"config": config, "normed": spec.post_norm, "scale": spec.residual_scale}
        return ModuleSpec(module=ResidualAdd, params=params)

    def attention() -> ModuleSpec:
        params: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "rope": layer.rope}
        if spec.latent is None:
            return ModuleSpec(module=RotaryAttention, params=params, submodules=submodules)
        rope = spec.ropes[layer.rope or 0]
        assert spec.attention_scale is not None and spec.norm == "rms" and not spec.output_bias, "no family has this"
        params |= {**asdict(spec.latent), "key_scale": rope.qk_scale, "scale": spec.attention_scale}
        return ModuleSpec(module=LatentAttention, params=params, submodules=submodules)

    core = {"window": layer.window, "softcap": spec.attention_softcap}
    submodules = SelfAttentionSubmodules(
        linear_qkv=_ColumnWithoutBias if spec.mlp_bias and not spec.qkv_bias else ColumnParallelLinear,
        core_attention=ModuleSpec(module=CoreAttention, params=core),
        linear_proj=_RowWithBias if spec.output_bias else _RowWithoutBias,
        q_layernorm=qk_norm(spec.num_attention_heads), k_layernorm=qk_norm(spec.num_query_groups)
    )
    norm = Norm if spec.pre_norm else IdentityOp

    def mlp() -> ModuleSpec:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        if not layer.moe:
            return ModuleSpec(module=MLP, submodules=linears)
        assert spec.experts is not None
        parts = MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=linears),
                              shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
                              router=functools.partial(Router, experts=spec.experts))
        return ModuleSpec(module=MoE, params={"pg_collection": collection}, submodules=parts)

    return ModuleSpec(module=TransformerLayer,
                      submodules=TransformerLayerSubmodules(
                          input_layernorm=norm, self_attention=attention(), self_attn_bda=residual_add(),
                          pre_mlp_layernorm=norm, mlp=mlp(), mlp_bda=residual_add(),
                          sharded_state_dict_keys_map=_names_on_disk(latent=spec.latent, moe=layer.moe)))


def _names_on_disk(*, latent: Latent | None, moe: bool) -> dict[str, str]:
    """{our name: that of Megatron's spec for Transformer Engine, in which a norm is a part of the linear layer behind}.
    """
    names = {} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if latent is None:
        return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **names}
    up = "self_attention.linear_q_proj." if latent.q_rank is None else "self_attention.linear_q_up_proj."
    return {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        "self_attention.linear_q_up.": up,
        **{f"self_attention.{name}.": f"self_attention.{name}_proj."
           for name in ("linear_q_down", "linear_kv_down", "linear_kv_up")},
        **names,
    }
