"""Which slices of HF tensors every rank holds in the trainer and in vLLM: the input of the reshard plan."""

from __future__ import annotations

from collections.abc import Collection

import torch

from mrlhf.models.families import hf_tensors, megatron_map, vllm_map
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel.planner import Planner, Shard
from mrlhf.parallel.reshard import StartMessages
from mrlhf.parallel.state import Layout, ranks_of_a_node
from mrlhf.parallel.weight_update import WeightUpdate


def trainer_shard(spec: ModelSpec, layout: Layout, rank: int) -> dict[str, list[TensorSlice]]:
    """A rank's parameters of the LM: its pipeline stage's layers, the embedding on the first, the head on the last."""
    tp, _, pp = layout.coordinates(rank)
    stages, shard = layout.stage_of_layers(spec.num_layers), {}
    all_stages = megatron_map(spec, head="lm", tp=layout.tp, rank=tp, ep=layout.ep, ep_rank=layout.expert_rank(rank))
    for name, slices in all_stages.items():
        if name.startswith("decoder.layers."):
            here = stages[int(name.split(".")[2])] == pp
        elif name.startswith("embedding."):
            here = pp == 0
        else:
            # with tied embeddings and one stage Megatron has no separate output layer
            here = pp == layout.pp - 1 and not (name == "output_layer.weight" and spec.tied and layout.pp == 1)
        if here:
            shard[name] = slices
    return shard


def make_planner(spec: ModelSpec, layout: Layout, *, rollout_tp: int, node: int, generators: int = 0) -> Planner:
    """From the trainer's layout to vLLM replicas of `rollout_tp` consecutive ranks. node: ranks per machine.

    generators: ranks after the trainer's that run vLLM only; 0: the trainer's ranks run it.
    """
    shards: dict[tuple[int, int, int], dict[str, list[TensorSlice]]] = {}
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
    replicas = layout.dp * layout.cp  # of a pipeline stage

    def distance(src: int, dst: int) -> tuple[int, ...]:
        """The same machine is nearest, then the same data- and context-parallel replica, then the same TP rank."""
        return src // node != dst // node, (src // layout.tp - dst // layout.tp) % replicas, (src - dst) % layout.tp

    tensors = hf_tensors(spec, head="lm")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wide = [name for name, tensor in tensors.items() if tensor.in_fp32]
    return Planner(sources, targets, shapes=shapes, distance=distance, wide=wide)


def make_weight_update(spec: ModelSpec, layout: Layout, *, rollout_tp: int, rank: int, dtype: torch.dtype,
                       made: Collection[str] = (), bucket_bytes: int = 256 << 20, node: int | None = None,
                       generators: int = 0, start_messages: StartMessages | None = None) -> WeightUpdate:
    """The plans of this rank.

    made: vLLM's parameters that are not written in place. generators: see `make_planner`; `rank` then counts the
    trainer's ranks first and the generators after them.
    """
    node = ranks_of_a_node() if node is None else node
    planner = make_planner(spec, layout, rollout_tp=rollout_tp, node=node, generators=generators)
    return WeightUpdate(planner, made=made, rank=rank, dtype=dtype, bucket_bytes=bucket_bytes,
                        start_messages=start_messages)
