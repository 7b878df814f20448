"""Bytes of a rank's part of a model between two steps: weights, gradients, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.parallel.state import Layout


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one rank."""

    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def _layer_parameters(spec: ModelSpec, layer: Layer, layout: Layout) -> tuple[int, int]:
    """(dense, of experts) of one layer on a rank.

    TP divides all but norms, routers, projections down to latent vectors and the biases of row-parallel matrices. A
    rank holds num / EP whole experts; with EP 1, TP divides every expert.
    """
    experts = 0
    if layer.moe and spec.experts is not None:
        experts = spec.experts.num * spec.mlp_parameters(spec.experts.ffn_hidden_size)
    whole = spec.whole_parameters(layer)
    dense = (spec.layer_parameters(layer) - experts - whole) // layout.tp + whole
    return dense, experts // (layout.ep if layout.ep > 1 else layout.tp)


def stage_memory(spec: ModelSpec, layout: Layout, *, dtype: str, head: str = "lm", trained: bool = True,
                 distributed_optimizer: bool = True) -> list[ModelMemory]:
    """For each pipeline stage, of the rank that holds most.

    A trained model also has fp32 gradients, Adam's two moments and (bf16) fp32 master weights; the distributed
    optimizer divides the last two over the data- and context-parallel ranks. TP divides the embedding, on the first
    stage, and the head, on the last, which has a copy of a tied embedding.
    """
    at, last = layout.stage_of_layers(spec.num_layers), layout.pp - 1
    dense, experts = [0] * layout.pp, [0] * layout.pp
    for stage, layer in zip(at, spec.layers, strict=True):
        of_layer = _layer_parameters(spec, layer, layout)
        dense[stage] += of_layer[0]
        experts[stage] += of_layer[1]
    vocabulary = spec.padded_vocab_size * spec.hidden_size // layout.tp
    dense[0] += vocabulary + spec.learned_positions * spec.max_position_embeddings * spec.hidden_size
    dense[last] += spec.norm_parameters
    if head == "value":
        dense[last] += spec.hidden_size
    elif not spec.tied or last:
        dense[last] += vocabulary
    weight = 4 if dtype == "float32" else 2
    if not trained:
        return [ModelMemory((d + e) * weight) for d, e in zip(dense, experts, strict=True)]
    state, dp = 8 + (4 if dtype == "bfloat16" else 0), max(1, layout.dp * layout.cp)
    expert_dp = max(1, layout.tp * dp // layout.ep) if layout.ep > 1 else dp
    shards = (dp, expert_dp) if distributed_optimizer else (1, 1)
    return [ModelMemory((d + e) * weight, (d + e) * 4, d * state // shards[0] + e * state // shards[1])
            for d, e in zip(dense, experts, strict=True)]
