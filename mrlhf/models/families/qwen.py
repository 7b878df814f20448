"""Qwen2 and Qwen2.5 (biases of q, k, v), Qwen3 (norms of q and k), Qwen3-MoE (experts in all or some layers)."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import Experts, Layer, ModelSpec

CLASSIFIERS = {
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    kind = f.get("model_type")
    # transformers' own defaults for these differ between versions
    f.need("num_key_value_heads", *(() if kind == "qwen2" else ("head_dim",)))
    common = f.common()
    n = common["num_layers"]
    experts, moe = _experts(f, n) if kind == "qwen3_moe" else (None, [False] * n)
    types, size = f.get("layer_types"), f.get("sliding_window")
    first = 0 if types is None and kind == "qwen3_moe" else f.get("max_window_layers", n)
    if types is None:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    windows = {"sliding_attention": size if f.get("use_sliding_window", False) else None}
    layers = tuple(Layer(window=windows.get(t), moe=m) for t, m in zip(types, moe, strict=True))
    bias = bool(f.get("attention_bias", False)) and kind != "qwen2"
    return ModelSpec(**{**common, "layers": layers}, ropes=(f.rope(),), qkv_bias=bias or kind == "qwen2",
                     output_bias=bias, qk_norm="none" if kind == "qwen2" else "head", experts=experts)


def _experts(f: Fields, n: int) -> tuple[Experts, list[bool]]:
    """transformers: a layer has experts if it is not in mlp_only_layers and (i + 1) % decoder_sparse_step == 0."""
    top_k, ffn = f.need("num_experts_per_tok", "moe_intermediate_size")
    num = f.get("num_experts", f.get("num_local_experts"))
    if num is None:
        f.need("num_experts")
    dense, step = f.get("mlp_only_layers", []), f.get("decoder_sparse_step", 1)
    moe = [i not in dense and (i + 1) % step == 0 for i in range(n)]
    return Experts(num, top_k, ffn, renormalise=bool(f.get("norm_topk_prob", False))), moe
