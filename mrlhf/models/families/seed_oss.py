"""Seed-OSS: Llama's block with biases for q, k and v and, if the config says so, for the output projection."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import ModelSpec

CLASSIFIERS = {"seed_oss": "SeedOssForSequenceClassification"}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    return ModelSpec(**f.common(), ropes=(f.rope(),), qkv_bias=f.get("attention_bias"),
                     output_bias=f.get("attention_out_bias"), mlp_bias=f.get("mlp_bias"))
