"""The BatchPlan of a run: its options and the groups that its model is built for."""

from __future__ import annotations

from mrlhf.config.options import TrainingConfig
from mrlhf.data.batching import BatchPlan
from mrlhf.parallel.state import Groups, pad_multiple, slice_multiple


def make_batch_plan(groups: Groups, *, packing: bool, micro_batch_size: int, max_tokens: int | None = None,
                    padding_side: str = "right") -> BatchPlan:
    """For this rank of `groups`."""
    return BatchPlan(packing=packing, micro_batch_size=micro_batch_size, max_tokens=max_tokens, dp_rank=groups.dp_rank,
                     dp_size=groups.layout.dp, pad_multiple=pad_multiple(groups.parallel),
                     micro_batch_multiple=slice_multiple(groups.parallel), padding_side=padding_side)


def training_batch_plan(config: TrainingConfig, groups: Groups) -> BatchPlan:
    """Of a training stage, for this rank of `groups` (a critic may have groups of its own)."""
    data, train = config.data, config.train
    return make_batch_plan(groups, packing=data.packing, micro_batch_size=train.micro_batch_size,
                           max_tokens=train.max_tokens_per_micro_batch, padding_side=data.padding_side)
