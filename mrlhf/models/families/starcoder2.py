"""StarCoder2: LayerNorm, biases, a plain GELU MLP, grouped-query attention with rotary positions, a sliding window."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import Names, VLLMNames
from mrlhf.models.families.spec import Layer, ModelSpec

CLASSIFIERS = {"starcoder2": "Starcoder2ForSequenceClassification"}
NAMES = Names(fc1=("mlp.c_fc",), fc2="mlp.c_proj")
VLLM = VLLMNames(fc1="mlp.c_fc")


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "gelu_pytorch_tanh")
    f.only("mlp_type", "default")
    f.only("norm_type", "layer_norm")
    f.need("num_key_value_heads")
    bias = bool(f.get("use_bias", True))
    common = f.common()
    common |= {"norm_eps": float(f.get("norm_epsilon", 1e-5)), "tied": bool(f.get("tie_word_embeddings", True))}
    common["layers"] = (Layer(window=f.get("sliding_window")),) * common["num_layers"]
    return ModelSpec(**common, ropes=(f.rope(),), norm="layer", gated=False, activation="gelu_tanh", qkv_bias=bias,
                     output_bias=bias, mlp_bias=bias)
