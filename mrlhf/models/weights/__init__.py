"""One weight map a family; `megatron_map`, `vllm_map` and `hf_shapes` pick it."""

from __future__ import annotations

from types import ModuleType

from mrlhf.models.spec import ModelSpec
from mrlhf.models.weights import llama
from mrlhf.models.weights.blocks import Block, Rule

_FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": llama, "qwen3": llama}


def _expand(rules: dict[str, Rule], num_layers: int, tp: int, rank: int) -> dict[str, list[Block]]:
    found = {}
    for name, rule in rules.items():
        blocks = rule.blocks(tp, rank)
        for i in range(num_layers) if "{i}" in name else (0,):
            found[name.replace("{i}", str(i))] = [Block(b.hf.replace("{i}", str(i)), b.dim, b.start, b.length, b.offset) for b in blocks]
    return found


def megatron_map(spec: ModelSpec, *, head: str, tp: int, rank: int) -> dict[str, list[Block]]:
    """Megatron parameter (global layer index) -> blocks of this tensor-parallel rank. `head`: lm or value."""
    return _expand(_FAMILIES[spec.family].megatron(spec, head), spec.num_layers, tp, rank)


def vllm_map(spec: ModelSpec, *, tp: int, rank: int) -> dict[str, list[Block]]:
    """vLLM parameter -> blocks of this tensor-parallel rank."""
    return _expand(_FAMILIES[spec.family].vllm(spec), spec.num_layers, tp, rank)


def hf_shapes(spec: ModelSpec, *, head: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint and its shape."""
    return _FAMILIES[spec.family].hf_shapes(spec, head)
