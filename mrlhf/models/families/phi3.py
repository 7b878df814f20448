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
    f.ignore("original_max_position_embeddings")  # only rotary scalings that f.rope refuses use it
    common = f.common()
    common["layers"] = (Layer(window=f.get("sliding_window")),) * common["num_layers"]
    return ModelSpec(**common, ropes=(f.rope(partial=True),))
