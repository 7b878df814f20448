"""SmolLM3: Llama's block with tied embeddings, without positions in every fourth layer."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import Layer, ModelSpec

CLASSIFIERS = {"smollm3": "SmolLM3ForSequenceClassification"}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    f.ignore("use_sliding_window", "max_window_layers", "no_rope_layer_interval")
    windows = f.windows(f.get("sliding_window"))
    if any(windows) and not f.get("use_sliding_window"):  # transformers' masks and its attention then disagree
        raise f.refuse("use_sliding_window", False, reason=" with sliding_attention in layer_types")
    # despite the name, 1 means that the layer has rotary positions
    rotated = f.get("no_rope_layers")
    layers = tuple(Layer(w, 0 if r else None) for w, r in zip(windows, rotated, strict=True))
    bias = f.get("attention_bias")
    return ModelSpec(**{**f.common(), "layers": layers}, ropes=(f.rope(),), qkv_bias=bias, output_bias=bias,
                     mlp_bias=f.get("mlp_bias"))
