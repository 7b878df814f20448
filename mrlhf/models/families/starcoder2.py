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
    f.only("scale_attn_weights", True)
    f.ignore("activation_function", "layer_norm_epsilon")  # transformers reads hidden_act and norm_epsilon
    bias, common = f.get("use_bias"), f.common(eps="norm_epsilon")
    common["layers"] = (Layer(window=f.get("sliding_window")),) * common["num_layers"]
    return ModelSpec(**common, ropes=(f.rope(),), norm="layer", gated=False, activation="gelu_tanh", qkv_bias=bias,
                     output_bias=bias, mlp_bias=bias)
