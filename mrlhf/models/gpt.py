"""ModelSpec -> megatron-core GPTModel, and its weights from HF files or from a seed.

The model is built empty and then filled block by block through the weight map, so that neither the initial
values nor anything read depends on TP, PP or DP.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mrlhf.config import ParallelConfig
from mrlhf.data.loader import MicroBatch
from mrlhf.models.heads import ValueHead
from mrlhf.models.spec import ModelSpec
from mrlhf.models.weights import hf_shapes, megatron_map
from mrlhf.models.weights.blocks import Block
from mrlhf.parallel import device
from mrlhf.parallel.attention import CoreAttention
from mrlhf.parallel.norms import Norm, QKNorm


def transformer_config(spec: ModelSpec, parallel: ParallelConfig, *, dtype: torch.dtype) -> TransformerConfig:
    """Fusions that need TE, apex or a compiler are off; the loss is summed, Megatron divides by the step's count."""
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths even for dense models
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not device.current().is_cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    qk_norm = QKNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_model(spec: ModelSpec, config: TransformerConfig, *, head: str) -> GPTModel:
    """This rank's part of the model, not yet filled. `head`: "lm" (vocabulary-parallel logits) or "value"."""
    layers = [_layer_spec(config)] * get_num_layers_to_build(config)
    is_last = parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm),
        vocab_size=spec.padded_vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tied and head == "lm",
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,  # type: ignore[arg-type]
        rope_scaling=spec.rope_factor is not None,
        rope_scaling_factor=spec.rope_factor or 8.0,
    )
    if head == "value" and is_last:
        model.output_layer = ValueHead(config)
    _mark_sharded(model)
    return model.to(device.current().name)


def _mark_sharded(model: GPTModel) -> None:
    """Megatron sets these attributes while it initialises values, which we skip; the gradient norm counts by them."""
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            sharded = {0: [module.weight, module.bias if isinstance(module, ColumnParallelLinear) else None]}
        elif isinstance(module, RowParallelLinear):
            sharded = {1: [module.weight]}
        else:
            continue
        for dim, parameters in sharded.items():
            for parameter in parameters:
                if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


class Source(Protocol):
    """Where values come from, in HF's names and shapes."""

    def read(self, block: Block) -> torch.Tensor: ...


class RandomSource:
    """New weights: N(0, std), std / sqrt(2 layers) for projections into the residual, ones for norms, zeros for biases.

    Each HF tensor has a generator of its own, from the seed and its name: the same values under any layout.
    The value head is N(0, 1 / (h + 1)).
    """

    def __init__(self, spec: ModelSpec, *, head: str, seed: int) -> None:
        self.spec, self.seed, self.shapes = spec, seed, hf_shapes(spec, head=head)
        self._last: tuple[str, torch.Tensor] | None = None

    def _tensor(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            shape = self.shapes[name]
            if name.endswith("bias"):
                value = torch.zeros(shape)
            elif "norm" in name:
                value = torch.ones(shape)
            else:
                generator = torch.Generator().manual_seed(
                    int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "big")
                )
                std = self.spec.init_std
                if name == "score.weight":
                    std = 1 / math.sqrt(self.spec.hidden_size + 1)
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.spec.num_layers)
                value = torch.randn(shape, generator=generator) * std
            self._last = (name, value)
        return self._last[1]

    def read(self, block: Block) -> torch.Tensor:
        return self._tensor(block.hf).narrow(block.dim, block.start, block.length)


def local_parameters(model: GPTModel) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """(name with the global layer index, parameter) of this rank."""
    offset = model.decoder.layers[0].layer_number - 1
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            index, rest = name[len("decoder.layers.") :].split(".", 1)
            name = f"decoder.layers.{int(index) + offset}.{rest}"
        yield name, parameter


def local_blocks(model: GPTModel, spec: ModelSpec, *, head: str) -> Iterable[tuple[str, torch.nn.Parameter, list[Block]]]:
    """(name, parameter, its blocks of HF tensors) of this rank."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    blocks = megatron_map(spec, head=head, tp=tp, rank=rank)
    for name, parameter in local_parameters(model):
        yield name, parameter, blocks[name]


@torch.no_grad()
def fill(model: GPTModel, spec: ModelSpec, source: Source, *, head: str, only: str = "") -> None:
    """Every parameter (or those whose name starts with `only`) from `source`; padding rows of the vocabulary become 0."""
    for name, parameter, blocks in local_blocks(model, spec, head=head):
        if name.startswith(only):
            parameter.zero_()
            for b in blocks:
                parameter.narrow(b.dim, b.offset, b.length).copy_(source.read(b))


def run(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Forward of one micro-batch: logits [B, T, V/TP] or values [B, T, 1] on the last stage, hidden states elsewhere."""
    packed = None
    if batch.cu_seqlens is not None:
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
    return model(batch.tokens_BT, None, batch.attention_mask, packed_seq_params=packed)
