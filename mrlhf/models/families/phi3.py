"""Phi-3 and Phi-4: Llama's block; HF keeps q, k and v in one matrix, and gate and up in another."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import VLLM_LLAMA, Names
from mrlhf.models.families.spec import Layer, ModelSpec

CLASSIFIERS = {"phi3": "Phi3ForSequenceClassification"}
NAMES = Names(qkv=("self_attn.qkv_proj",), fc1=("mlp.gate_up_proj",))
VLLM = VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    f.get("original_max_position_embeddings")  # means something to the rotary scalings that f.rope refuses
    common = f.common()
    layers = (Layer(window=f.get("sliding_window")),) * common["num_layers"]
    return ModelSpec(**{**common, "norm_eps": float(f.get("rms_norm_eps", 1e-5)), "layers": layers}, ropes=(f.rope(partial=1.0),))
