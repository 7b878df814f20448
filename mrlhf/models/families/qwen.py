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
    common = f.common()
    n = common["num_layers"]
    experts, moe = _experts(f, n) if kind == "qwen3_moe" else (None, [False] * n)
    f.ignore("use_sliding_window", "max_window_layers")  # transformers has made layer_types and sliding_window of them
    window = f.get("sliding_window")
    windows = [window] * n if kind == "qwen3_moe" else f.windows(window)
    bias = f.get("attention_bias", False) and kind != "qwen2"
    if kind != "qwen2":
        f.only("use_qk_norm", True)
    layers = tuple(Layer(window=w, moe=m) for w, m in zip(windows, moe, strict=True))
    return ModelSpec(**{**common, "layers": layers}, ropes=(f.rope(),), qkv_bias=bias or kind == "qwen2",
                     output_bias=bias, qk_norm="none" if kind == "qwen2" else "head", experts=experts)


def _experts(f: Fields, n: int) -> tuple[Experts, list[bool]]:
    """transformers: a layer has experts if it is not in mlp_only_layers and (i + 1) % decoder_sparse_step == 0."""
    dense, step = f.get("mlp_only_layers"), f.get("decoder_sparse_step")
    moe = [i not in dense and (i + 1) % step == 0 for i in range(n)]
    return Experts(f.get("num_experts"), f.get("num_experts_per_tok"), f.get("moe_intermediate_size"),
                   renormalise=f.get("norm_topk_prob")), moe
