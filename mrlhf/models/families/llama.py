"""Llama 2, 3 and 3.x: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import ModelSpec

CLASSIFIERS = {"llama": "LlamaForSequenceClassification"}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    bias = f.get("attention_bias")
    return ModelSpec(**f.common(), ropes=(f.rope(),), qkv_bias=bias, output_bias=bias, mlp_bias=f.get("mlp_bias"))
