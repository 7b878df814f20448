"""A family's names for the parts of a decoder, in HF's files and in vLLM. Empty: the family has no such part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names without `.weight` and `.bias`. Names in a layer follow the prefix `layer`, where {i} is its index."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{i}."
    attention_norm: str = "input_layernorm"
    # one name: a matrix of all q, all k, all v
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    q_down: str = "self_attn.q_a_proj"  # this and the next five: latent attention
    q_down_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_down_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"
    output: str = "self_attn.o_proj"
    attention_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # one name and gated: a matrix of gate over up
    fc2: str = "mlp.down_proj"
    mlp_post_norm: str = ""
    router: str = "mlp.gate"
    selection_bias: str = "mlp.gate.e_score_correction_bias"
    expert_fc1: tuple[str, str] = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")  # {e}: index of the expert
    expert_fc2: str = "mlp.experts.{e}.down_proj"
    shared_fc1: tuple[str, str] = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_fc2: str = "mlp.shared_experts.down_proj"
    transposed: bool = False  # HF keeps the layers' matrices as [in, out]


@dataclass(frozen=True)
class VLLMNames:
    """vLLM's names where they differ from HF's. vLLM stacks q over k over v, and gate over up."""

    qkv: str = "self_attn.qkv_proj"
    fc1: str = "mlp.gate_up_proj"
    experts: str = "mlp.experts."
    shared_fc1: str = "mlp.shared_experts.gate_up_proj"


LLAMA, VLLM_LLAMA = Names(), VLLMNames()
