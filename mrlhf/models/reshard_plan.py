"""Which blocks every rank of the world holds: in the trainer, and in vLLM. Input of the reshard plan."""

from __future__ import annotations

from collections.abc import Collection

import torch

from mrlhf.models.families import hf_tensors, megatron_map, vllm_map
from mrlhf.models.families.blocks import Block
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel.reshard import Planner, Shard, StartMessages
from mrlhf.parallel.state import Layout, ranks_of_a_node
from mrlhf.parallel.weight_update import WeightUpdate


def trainer_shard(spec: ModelSpec, layout: Layout, rank: int) -> dict[str, list[Block]]:
    """Parameters of a rank of the LM: its pipeline stage's layers, the embedding on the first, the head on the last."""
    tp, _, pp = layout.coordinates(rank)
    stages = layout.stage_of_layers(spec.num_layers)
    found = {}
    for name, blocks in megatron_map(spec, head="lm", tp=layout.tp, rank=tp, ep=layout.ep, ep_rank=layout.expert_rank(rank)).items():
        if name.startswith("decoder.layers."):
            here = stages[int(name.split(".")[2])] == pp
        elif name.startswith("embedding."):
            here = pp == 0
        else:
            # with tied embeddings and one stage Megatron has no separate output layer
            here = pp == layout.pp - 1 and not (name == "output_layer.weight" and spec.tied and layout.pp == 1)
        if here:
            found[name] = blocks
    return found


def make_planner(spec: ModelSpec, layout: Layout, *, rollout_tp: int, node: int, generators: int = 0) -> Planner:
    """From the trainer's layout to vLLM replicas of `rollout_tp` consecutive ranks; `node`: ranks of a machine.

    generators: ranks behind the trainer's that have vLLM and nothing else; 0: the trainer's ranks have it.
    """
    shards: dict[tuple[int, int, int], dict[str, list[Block]]] = {}
    sources = []
    for rank in range(layout.world):
        tp, _, pp = layout.coordinates(rank)
        place = tp, pp, layout.expert_rank(rank)
        if place not in shards:
            shards[place] = trainer_shard(spec, layout, rank)
        sources.append(shards[place])
    by_tp = [vllm_map(spec, tp=rollout_tp, rank=r) for r in range(rollout_tp)]
    targets: list[Shard] = [by_tp[r % rollout_tp] for r in range(generators or layout.world)]
    if generators:
        sources += [{} for _ in range(generators)]
        targets = [{} for _ in range(layout.world)] + targets
    replicas = layout.dp * layout.cp  # of a stage

    def distance(src: int, dst: int) -> tuple[int, ...]:
        """The same machine first, then the same data- and context-parallel replica, then the same tensor-parallel place."""
        return src // node != dst // node, (src // layout.tp - dst // layout.tp) % replicas, (src - dst) % layout.tp

    tensors = hf_tensors(spec, head="lm")
    shapes, wide = {name: t.shape for name, t in tensors.items()}, [name for name, t in tensors.items() if t.in_fp32]
    return Planner(sources, targets, shapes=shapes, distance=distance, wide=wide)


def make_weight_update(
    spec: ModelSpec,
    layout: Layout,
    *,
    rollout_tp: int,
    rank: int,
    dtype: torch.dtype,
    made: Collection[str] = (),
    bucket_bytes: int = 256 << 20,
    node: int | None = None,
    generators: int = 0,
    start_messages: StartMessages | None = None,
) -> WeightUpdate:
    """The plans of this rank. made: vLLM's parameters that are not written in place; generators: see `make_planner`; `rank` counts over both sides then."""
    planner = make_planner(spec, layout, rollout_tp=rollout_tp, node=ranks_of_a_node() if node is None else node, generators=generators)
    return WeightUpdate(planner, made=made, rank=rank, dtype=dtype, bucket_bytes=bucket_bytes, start_messages=start_messages)
