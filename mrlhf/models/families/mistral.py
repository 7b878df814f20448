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
    common = f.common()
    is_moe = f.get("model_type") == "mixtral"
    experts = None
    if "layer_types" in f.given:  # transformers then takes another class, also where it is null
        raise f.refuse("layer_types", f.given["layer_types"], expected="no layer_types")
    if is_moe:
        f.only("router_jitter_noise", 0.0)
        experts = Experts(f.get("num_local_experts"), f.get("num_experts_per_tok"), common["ffn_hidden_size"])
    common["layers"] = (Layer(window=f.get("sliding_window"), moe=is_moe),) * common["num_layers"]
    return ModelSpec(**common, ropes=(f.rope(),), experts=experts)
