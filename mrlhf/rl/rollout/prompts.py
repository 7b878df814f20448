"""Which prompts a rollout takes, and what a checkpoint keeps of that: every prompt of the order once, refills included."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrlhf.config.options import PPOStage
from mrlhf.data.blend import Dataset
from mrlhf.data.order import Order
from mrlhf.training.row_order import data_position, make_order, restore_position, source_epochs


def make_prompt_order(config: PPOStage, data: Dataset) -> Order:
    """Prompts of rollout 1, 2, ...: whole rollouts only, the last one goes on into a new epoch, no prompt is dropped."""
    train = replace(config.train, global_batch_size=config.rollout.batch_size)
    prompts = replace(config, train=train, data=replace(config.data, packing=False))
    rollouts = make_order(prompts, data).total_steps
    return make_order(replace(prompts, train=replace(train, max_steps=rollouts)), data)


class Prompts:
    """The order of the prompts and how many were drawn from it. Refills (rollout.dynamic_sampling) draw more than a rollout's prompts, so
    that a run then goes over its prompts more often than train.num_epochs says; the number of rollouts stays.
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
        """The rows that the next `draw(n)` will give: a rollout that is made ahead counts when it is used."""
        return self.order.peek(self.drawn, self.drawn + n)

    def metrics(self) -> dict[str, float]:
        consumed = self.order.taken_at(self.drawn)
        return {"train/epoch": self.drawn / self.order.mix.pass_rows, **source_epochs(self.order, self.data, consumed)}

    def state(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return {"prompts_drawn": self.drawn, **data_position(self.order, self.data, self.order.taken_at(self.drawn))}

    def restore(self, manifest: dict[str, Any], *, where: str, hf_dir: Path | None = None, allowed: Collection[str] = ()) -> None:
        """Raises CheckpointError where the data is not what the checkpoint was trained on."""
        self.drawn = manifest.get("prompts_drawn", self.order.position(manifest["step"]))
        restore_position(self.order, self.data, manifest, where=where, position=self.drawn, hf_dir=hf_dir, allowed=allowed)
