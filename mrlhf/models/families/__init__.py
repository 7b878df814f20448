"""The model families: config.json -> ModelSpec, and the weight maps between HF's files, Megatron and vLLM.

A family is a module with
  CLASSIFIERS  model_type -> transformers' class for a value model, "" where it has none
  NAMES        names of HF's tensors (of each model_type, where they differ)
  VLLM         where vLLM's names differ from HF's
  spec(fields) -> ModelSpec
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mrlhf.errors import CheckpointError
from mrlhf.models.families import deepseek, gemma, glm4, gpt2, granite, llama, mistral, olmo2, phi3, qwen, seed_oss, smollm3, starcoder2
from mrlhf.models.families.blocks import Block
from mrlhf.models.families.fields import Fields
from mrlhf.models.families.maps import Entry, HFTensor, entries
from mrlhf.models.families.spec import ModelSpec

_MODULES = (llama, mistral, qwen, gemma, phi3, gpt2, olmo2, granite, glm4, starcoder2, smollm3, seed_oss, deepseek)
FAMILIES: dict[str, ModuleType] = {kind: module for module in _MODULES for kind in module.CLASSIFIERS}


def spec_from_hf(config: Mapping[str, Any], *, where: str = "config.json") -> ModelSpec:
    """Raises CheckpointError for families and fields that this version cannot express."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"model_type = {kind!r} is not supported", where=where, expected=", ".join(sorted(FAMILIES)))
    fields = Fields(config, where)
    try:
        spec: ModelSpec = FAMILIES[kind].spec(fields)
    except (TypeError, ValueError, AttributeError) as error:  # a string where a number belongs, and the like
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"a field has an impossible value: {error}", where=where) from error
    fields.finish()
    return spec


def classifier(spec: ModelSpec) -> str:
    """transformers' class name for a value model of this family; "" where transformers has none."""
    return FAMILIES[spec.family].CLASSIFIERS[spec.family]


@functools.lru_cache(maxsize=32)
def _entries(spec: ModelSpec, head: str) -> tuple[Entry, ...]:
    family = FAMILIES[spec.family]
    names = family.NAMES[spec.family] if isinstance(family.NAMES, dict) else family.NAMES
    return tuple(entries(spec, names, family.VLLM, head=head))


def megatron_map(spec: ModelSpec, *, head: str, tp: int, rank: int, ep: int = 1, ep_rank: int = 0) -> dict[str, list[Block]]:
    """Megatron parameter (global layer and expert index) -> blocks of this rank. `head`: lm or value.

    With ep > 1 a rank holds whole experts, `num / ep` of them, whatever tp is.
    """
    found, per_rank = {}, spec.experts.num // ep if spec.experts else 0
    for e in _entries(spec, head):
        if e.is_expert and ep > 1:
            if int(e.megatron.split(".local_experts.")[1].split(".")[0]) // per_rank == ep_rank:
                found[e.megatron] = e.rule.blocks(1, 0)
        else:
            found[e.megatron] = e.rule.blocks(tp, rank)
    return found


def vllm_map(spec: ModelSpec, *, tp: int, rank: int) -> dict[str, list[Block]]:
    """vLLM parameter -> blocks of this tensor-parallel rank; experts as slices of vLLM's stacked parameters, `...experts.{e}.w13_weight`."""
    return {e.vllm: e.vllm_rule.blocks(tp, rank) for e in _entries(spec, "lm") if not (spec.tied and e.megatron == "output_layer.weight")}


def vllm_config(spec: ModelSpec) -> dict[str, Any]:
    """What vLLM reads in config.json where transformers goes by the model's class: without it DeepSeek's experts would be chosen otherwise."""
    if spec.latent is None or spec.experts is None:
        return {}
    e = spec.experts
    return {"n_group": e.groups, "topk_group": e.top_groups, "scoring_func": e.score} | (
        {"topk_method": "noaux_tc"} if e.selection_bias else {}
    )


def hf_tensors(spec: ModelSpec, *, head: str) -> dict[str, HFTensor]:
    """Every tensor of the HF checkpoint."""
    return {name: tensor for e in _entries(spec, head) for name, tensor in e.hf.items()}


def hf_shapes(spec: ModelSpec, *, head: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint and its shape as [out, in]."""
    return {name: tensor.shape for name, tensor in hf_tensors(spec, head=head).items()}
