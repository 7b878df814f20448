"""Mistral and Mixtral: Llama's block, every layer with the sliding window if one is set; Mixtral's MLPs are experts."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import Names, VLLMNames
from mrlhf.models.families.spec import Experts, Layer, ModelSpec

CLASSIFIERS = {"mistral": "MistralForSequenceClassification", "mixtral": "MixtralForSequenceClassification"}
_MOE = "block_sparse_moe."
NAMES = Names(router=_MOE + "gate", expert_fc1=(_MOE + "experts.{e}.w1", _MOE + "experts.{e}.w3"),
              expert_fc2=_MOE + "experts.{e}.w2")
VLLM = VLLMNames(experts=_MOE + "experts.")


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    (groups,) = f.need("num_key_value_heads")
    common = f.common()
    is_moe = f.get("model_type") == "mixtral"
    experts = None
    if is_moe:
        f.only("router_jitter_noise", 0.0)
        num, top_k = f.need("num_local_experts", "num_experts_per_tok")
        experts = Experts(num, top_k, common["ffn_hidden_size"])
    layer = Layer(window=f.get("sliding_window"), moe=is_moe)
    common |= {"num_query_groups": groups, "layers": (layer,) * common["num_layers"]}
    return ModelSpec(**common, ropes=(f.rope(theta=1e6 if is_moe else 10000.0),), experts=experts)
