"""Llama, Qwen2 and Qwen3 share one block: RMSNorm, grouped-query attention with RoPE, SwiGLU.

They differ in the bias of q, k, v (Qwen2) and the norms of q and k (Qwen3). `{i}` is the layer.
"""

from __future__ import annotations

from mrlhf.models.spec import VOCAB_MULTIPLE, ModelSpec
from mrlhf.models.weights.blocks import Columns, Copy, GroupedQKV, Rule, Stacked, StackedQKV, Vocab

_HF = "model.layers.{i}."
_Q, _K, _V = (_HF + f"self_attn.{x}_proj." for x in "qkv")
_VLLM_VOCAB_MULTIPLE = 64


def megatron(spec: ModelSpec, head: str) -> dict[str, Rule]:
    """Megatron parameter name (global layer index in place of `{i}`) -> rule. `head`: lm or value."""
    h, f, layer = spec.hidden_size, spec.ffn_hidden_size, "decoder.layers.{i}."
    attention = (spec.num_attention_heads, spec.num_query_groups, spec.head_dim)
    output: Rule
    if head == "value":
        output = Copy("score.weight", 1)
    else:
        output = Vocab("model.embed_tokens.weight" if spec.tied else "lm_head.weight", spec.vocab_size, VOCAB_MULTIPLE)
    rules: dict[str, Rule] = {
        "embedding.word_embeddings.weight": Vocab("model.embed_tokens.weight", spec.vocab_size, VOCAB_MULTIPLE),
        "decoder.final_layernorm.weight": Copy("model.norm.weight", h),
        "output_layer.weight": output,
        layer + "input_layernorm.weight": Copy(_HF + "input_layernorm.weight", h),
        layer + "self_attention.linear_qkv.weight": GroupedQKV(_Q + "weight", _K + "weight", _V + "weight", *attention),
        layer + "self_attention.linear_proj.weight": Columns(_HF + "self_attn.o_proj.weight", spec.num_attention_heads * spec.head_dim),
        layer + "pre_mlp_layernorm.weight": Copy(_HF + "post_attention_layernorm.weight", h),
        layer + "mlp.linear_fc1.weight": Stacked((_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), f),
        layer + "mlp.linear_fc2.weight": Columns(_HF + "mlp.down_proj.weight", f),
    }
    if spec.qkv_bias:
        rules[layer + "self_attention.linear_qkv.bias"] = GroupedQKV(_Q + "bias", _K + "bias", _V + "bias", *attention)
    if spec.qk_norm:
        for x in "qk":
            rules[layer + f"self_attention.{x}_layernorm.weight"] = Copy(_HF + f"self_attn.{x}_norm.weight", spec.head_dim)
    return rules


def vllm(spec: ModelSpec) -> dict[str, Rule]:
    """vLLM parameter name -> rule, for dense weights that keep their layout after loading."""
    h, f = spec.hidden_size, spec.ffn_hidden_size
    attention = (spec.num_attention_heads, spec.num_query_groups, spec.head_dim)
    rules: dict[str, Rule] = {
        "model.embed_tokens.weight": Vocab("model.embed_tokens.weight", spec.vocab_size, _VLLM_VOCAB_MULTIPLE),
        "model.norm.weight": Copy("model.norm.weight", h),
        _HF + "input_layernorm.weight": Copy(_HF + "input_layernorm.weight", h),
        _HF + "post_attention_layernorm.weight": Copy(_HF + "post_attention_layernorm.weight", h),
        _HF + "self_attn.qkv_proj.weight": StackedQKV(_Q + "weight", _K + "weight", _V + "weight", *attention),
        _HF + "self_attn.o_proj.weight": Columns(_HF + "self_attn.o_proj.weight", spec.num_attention_heads * spec.head_dim),
        _HF + "mlp.gate_up_proj.weight": Stacked((_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), f),
        _HF + "mlp.down_proj.weight": Columns(_HF + "mlp.down_proj.weight", f),
    }
    if not spec.tied:
        rules["lm_head.weight"] = Vocab("lm_head.weight", spec.vocab_size, _VLLM_VOCAB_MULTIPLE)
    if spec.qkv_bias:
        rules[_HF + "self_attn.qkv_proj.bias"] = StackedQKV(_Q + "bias", _K + "bias", _V + "bias", *attention)
    if spec.qk_norm:
        for x in "qk":
            rules[_HF + f"self_attn.{x}_norm.weight"] = Copy(_HF + f"self_attn.{x}_norm.weight", spec.head_dim)
    return rules


def hf_shapes(spec: ModelSpec, head: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint and its shape."""
    h, f, q, kv = spec.hidden_size, spec.ffn_hidden_size, spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, h), "model.norm.weight": (h,)}
    if head == "value":
        shapes["score.weight"] = (1, h)
    elif not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, h)
    for i in range(spec.num_layers):
        p = _HF.format(i=i)
        shapes |= {
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (q, h),
            p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h),
            p + "self_attn.o_proj.weight": (h, q),
            p + "mlp.gate_proj.weight": (f, h),
            p + "mlp.up_proj.weight": (f, h),
            p + "mlp.down_proj.weight": (h, f),
        }
        if spec.qkv_bias:
            shapes |= {p + f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if spec.qk_norm:
            shapes |= {p + f"self_attn.{x}_norm.weight": (spec.head_dim,) for x in "qk"}
    return shapes
