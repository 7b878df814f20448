"""Granite: Llama's block with four multipliers: for the embedding, each branch, the scores, and the logits."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import ModelSpec

CLASSIFIERS = {"granite": ""}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    bias = bool(f.get("attention_bias", False))
    return ModelSpec(**f.common(), ropes=(f.rope(),), qkv_bias=bias, output_bias=bias,
                     mlp_bias=bool(f.get("mlp_bias", False)), embedding_scale=float(f.get("embedding_multiplier", 1.0)),
                     residual_scale=float(f.get("residual_multiplier", 1.0)),
                     attention_scale=float(f.get("attention_multiplier", 1.0)),
                     logit_scale=1 / float(f.get("logits_scaling", 1.0)))
