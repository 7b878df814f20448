"""GLM-4 (0414): norms before and after attention and MLP; half of each head is rotated, in pairs of neighbours."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import VLLM_LLAMA, Names
from mrlhf.models.families.spec import ModelSpec

CLASSIFIERS = {"glm4": "Glm4ForSequenceClassification"}
NAMES = Names(attention_post_norm="post_self_attn_layernorm", fc1=("mlp.gate_up_proj",),
              mlp_post_norm="post_mlp_layernorm")
VLLM = VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    ropes = (f.rope(partial=True, interleaved=True),)
    return ModelSpec(**f.common(), ropes=ropes, post_norm=True, qkv_bias=f.get("attention_bias"))
