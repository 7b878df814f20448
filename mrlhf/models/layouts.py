"""Which blocks every rank of the world holds: in the trainer, and in vLLM. Input of the reshard plan."""

from __future__ import annotations

from mrlhf.models.families import megatron_map, vllm_map
from mrlhf.models.families.blocks import Block
from mrlhf.models.spec import ModelSpec
from mrlhf.parallel.reshard import Reshard
from mrlhf.parallel.state import Layout


def trainer_shard(spec: ModelSpec, layout: Layout, rank: int) -> dict[str, list[Block]]:
    """Parameters of a rank of the LM: its pipeline stage's layers, the embedding on the first, the head on the last."""
    tp, _, pp = layout.coordinates(rank)
    stages = layout.stages(spec.num_layers)
    found = {}
    for name, blocks in megatron_map(
        spec, head="lm", tp=layout.tp, rank=tp, ep=layout.ep, ep_rank=layout.expert_rank(rank)
    ).items():
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


def make_reshard(spec: ModelSpec, layout: Layout, *, rollout_tp: int, rank: int) -> Reshard:
    """From the trainer's layout to vLLM replicas of `rollout_tp` consecutive ranks."""
    sources = [trainer_shard(spec, layout, r) for r in range(layout.world)]
    by_tp = [vllm_map(spec, tp=rollout_tp, rank=r) for r in range(rollout_tp)]
    targets = [by_tp[r % rollout_tp] for r in range(layout.world)]

    def distance(src: int, dst: int) -> tuple[int, ...]:
        """The same data-parallel replica first, then the same tensor-parallel place."""
        (src_tp, src_dp, _), (dst_tp, dst_dp, _) = layout.coordinates(src), layout.coordinates(dst)
        return (src_dp - dst_dp) % layout.dp, (src_tp - dst_tp) % layout.tp

    return Reshard(sources, targets, distance=distance, rank=rank)
