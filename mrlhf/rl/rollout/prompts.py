"""The prompts of each rollout and their position in a checkpoint: every prompt of the order is drawn once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrlhf.config.options import PPOStage
from mrlhf.data.blend import Dataset
from mrlhf.data.order import Order
from mrlhf.training.batches import data_position, make_order, restore_position, source_epochs


def make_prompt_order(config: PPOStage, data: Dataset) -> Order:
    """The prompts of rollout 1, 2, ...: every rollout is full, the last one continues in a new epoch."""
    train = replace(config.train, global_batch_size=config.rollout.batch_size)
    prompts = replace(config, train=train, data=replace(config.data, packing=False))
    rollouts = make_order(prompts, data).total_steps
    return make_order(replace(prompts, train=replace(train, max_steps=rollouts)), data)


class Prompts:
    """The order of the prompts and the number drawn so far.

    Refills (rollout.dynamic_sampling) draw extra prompts: the number of rollouts stays, and the run passes over its
    prompts more often than train.num_epochs says.
    """

    def __init__(self, config: PPOStage, data: Dataset) -> None:
        self.data, self.order, self.drawn = data, make_prompt_order(config, data), 0

    @property
    def total_steps(self) -> int:
        """Rollouts of the run."""
        return self.order.total_steps

    def draw(self, n: int) -> list[int]:
        """The next n rows."""
        self.drawn += n
        return self.order.span(self.drawn - n, self.drawn)

    def peek(self, n: int) -> list[int]:
        """The rows of the next `draw(n)`. A rollout generated ahead counts as drawn when it is used."""
        return self.order.peek(self.drawn, self.drawn + n)

    def metrics(self) -> dict[str, float]:
        consumed = self.order.taken_at(self.drawn)
        return {"train/epoch": self.drawn / self.order.mix.pass_rows, **source_epochs(self.order, self.data, consumed)}

    def state(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return {"prompts_drawn": self.drawn, **data_position(self.order, self.data, self.order.taken_at(self.drawn))}

    def restore(
        self, manifest: dict[str, Any], *, where: str, hf_dir: Path | None = None, allowed: Collection[str] = ()
    ) -> None:
        """Continues after a checkpoint. Raises CheckpointError if the data is not what it was trained on."""
        self.drawn = manifest.get("prompts_drawn", self.order.position(manifest["step"]))
        at, data = self.drawn, self.data
        restore_position(self.order, data, manifest, where=where, position=at, hf_dir=hf_dir, allowed=allowed)
