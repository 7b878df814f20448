"""Granite: Llama's block with four multipliers: for the embedding, each branch, the scores, and the logits."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import ModelSpec

CLASSIFIERS = {"granite": ""}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    bias = f.get("attention_bias")
    return ModelSpec(**f.common(), ropes=(f.rope(),), qkv_bias=bias, output_bias=bias, mlp_bias=f.get("mlp_bias"),
                     embedding_scale=f.get("embedding_multiplier"), residual_scale=f.get("residual_multiplier"),
                     attention_scale=f.get("attention_multiplier"), logit_scale=1 / f.get("logits_scaling"))
