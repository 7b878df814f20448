"""Model families: config.json -> ModelSpec, and the weight maps between HF's files, Megatron and vLLM.

A family is a module with
  CLASSIFIERS  model_type -> transformers' class for a value model, "" if transformers has none
  NAMES        names of HF's tensors, or {model_type: names} if they differ
  VLLM         vLLM's names where they differ from HF's
  spec(fields) -> ModelSpec
README.md in this folder shows how to add one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mrlhf.errors import CheckpointError
from mrlhf.models.families import deepseek, gemma, glm4, gpt2, granite, llama, mistral, olmo2, phi3, qwen, seed_oss
from mrlhf.models.families.fields import Fields
from mrlhf.models.families.maps import HFTensor, MapEntry, map_entries
from mrlhf.models.families.names import Names
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec, in_bounds

# isort: split
from mrlhf.models.families import smollm3, starcoder2

_MODULES = (llama, mistral, qwen, gemma, phi3, gpt2, olmo2, granite, glm4, starcoder2, smollm3, seed_oss, deepseek)
FAMILIES: dict[str, ModuleType] = {model_type: module for module in _MODULES for model_type in module.CLASSIFIERS}


def spec_from_hf(config: Mapping[str, Any], *, where: str = "config.json") -> ModelSpec:
    """Raises CheckpointError for families and fields that this version cannot express."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"model_type = {str(model_type)[:100]!r} is not supported", where=where,
                              expected=supported)
    fields = Fields(config, where)
    try:
        spec = in_bounds(FAMILIES[model_type].spec(fields))
        fields.check_all_read()
    except CheckpointError:
        raise
    except Exception as error:  # a hostile value fails in any operation: TypeError, KeyError, ZeroDivisionError ...
        what = f"a field has an impossible value: {type(error).__name__}: {error}"
        raise CheckpointError(what, where=where) from error
    return spec


def classifier_class(spec: ModelSpec) -> str:
    """Name of transformers' class for a value model of this family; "" if transformers has none."""
    return FAMILIES[spec.family].CLASSIFIERS[spec.family]


def _names(spec: ModelSpec) -> Names:
    names = FAMILIES[spec.family].NAMES
    return names[spec.family] if isinstance(names, dict) else names


@functools.lru_cache(maxsize=32)
def _map_entries(spec: ModelSpec, head: str) -> tuple[MapEntry, ...]:
    return tuple(map_entries(spec, _names(spec), FAMILIES[spec.family].VLLM, head=head))


def end_matrices(spec: ModelSpec) -> tuple[str, str]:
    """HF's names of the embedding and of the LM head, which a file may hold also where they are tied."""
    return f"{_names(spec).embedding}.weight", f"{_names(spec).head}.weight"


def megatron_map(
    spec: ModelSpec, *, head: str, tp: int, rank: int, ep: int = 1, ep_rank: int = 0
) -> dict[str, list[TensorSlice]]:
    """Megatron parameter (named with global layer and expert index) -> slices of HF tensors in this rank's shard.

    head: "lm" or "value". With ep > 1 a rank holds whole experts, `num / ep` of them, whatever tp is.
    """
    slices, per_rank = {}, spec.experts.num // ep if spec.experts else 0
    for e in _map_entries(spec, head):
        if not e.is_expert or ep == 1:
            slices[e.megatron] = e.rule.slices(tp, rank)
        elif int(e.megatron.split(".local_experts.")[1].split(".")[0]) // per_rank == ep_rank:
            slices[e.megatron] = e.rule.slices(1, 0)
    return slices


def vllm_map(spec: ModelSpec, *, tp: int, rank: int) -> dict[str, list[TensorSlice]]:
    """vLLM parameter -> slices of HF tensors in this tensor-parallel rank's shard.

    An expert is a part of vLLM's stacked parameter: `...experts.{e}.w13_weight`.
    """
    entries = [e for e in _map_entries(spec, "lm") if not (spec.tied and e.megatron == "output_layer.weight")]
    return {e.vllm: e.vllm_rule.slices(tp, rank) for e in entries}


def vllm_config(spec: ModelSpec) -> dict[str, Any]:
    """Keys of config.json for vLLM: it ties by config.json, and would choose other experts for DeepSeek's tokens."""
    tied = {"tie_word_embeddings": spec.tied}
    if spec.latent is None or spec.experts is None:
        return tied
    e = spec.experts
    routing = tied | {"n_group": e.groups, "topk_group": e.top_groups, "scoring_func": e.score}
    return routing | ({"topk_method": "noaux_tc"} if e.selection_bias else {})


def hf_tensors(spec: ModelSpec, *, head: str) -> dict[str, HFTensor]:
    """Every tensor of the HF checkpoint."""
    return {name: tensor for e in _map_entries(spec, head) for name, tensor in e.hf.items()}
