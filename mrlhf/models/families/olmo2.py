"""OLMo 2: norms after attention and MLP, none before; q and k are normed over all heads together."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import VLLM_LLAMA, Names
from mrlhf.models.families.spec import ModelSpec

CLASSIFIERS = {"olmo2": "Olmo2ForSequenceClassification"}
NAMES = Names(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
VLLM = VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    bias = f.get("attention_bias")
    return ModelSpec(**f.common(), ropes=(f.rope(),), pre_norm=False, post_norm=True, qk_norm="all", qkv_bias=bias,
                     output_bias=bias)
