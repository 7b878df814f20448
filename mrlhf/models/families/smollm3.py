"""SmolLM3: Llama's block with tied embeddings, without positions in every fourth layer."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import Layer, ModelSpec

CLASSIFIERS = {"smollm3": "SmolLM3ForSequenceClassification"}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    f.only("pretraining_tp", 1)
    f.need("num_key_value_heads")
    f.ignore("max_window_layers")
    common = f.common()
    n = common["num_layers"]
    interval, window = f.get("no_rope_layer_interval", 4), f.get("sliding_window")
    # despite the name, 1 means that the layer has rotary positions
    rotated = f.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]
    window = window if f.get("use_sliding_window", False) else None
    types = f.get("layer_types") or ["sliding_attention" if window and not r else "full_attention" for r in rotated]
    windows = {"sliding_attention": window}
    layers = tuple(Layer(windows.get(t), 0 if r else None) for t, r in zip(types, rotated, strict=True))
    bias, mlp_bias = bool(f.get("attention_bias", False)), bool(f.get("mlp_bias", False))
    common |= {"layers": layers, "tied": bool(f.get("tie_word_embeddings", True))}
    return ModelSpec(**common, ropes=(f.rope(theta=2e6),), qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
