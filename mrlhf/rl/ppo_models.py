"""The Megatron models of a PPO run and their passes over a rollout.

Legend: B answers of a rollout, A tokens of the longest answer, T tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrlhf.checkpoint.save import Part
from mrlhf.config.options import PPOStage
from mrlhf.data.loader import MicroBatch
from mrlhf.models.layers.router_losses import count_for, make_balance, trained_tokens
from mrlhf.parallel import state
from mrlhf.rl.rewards.sources import critic_source
from mrlhf.rl.rollout.tables import Rollout, compute_tables, micro_batches
from mrlhf.training.batches import training_batch_plan
from mrlhf.training.preflight import RunInputs
from mrlhf.training.trainer import Model, Trainer


class PPOModels:
    """Actor, critic and reference. `critic` is None if the estimator needs none, `reference` if kl.coef is 0."""

    def __init__(self, config: PPOStage, inputs: RunInputs, *, updates: int) -> None:
        """updates: number of optimizer steps of the whole run, for the schedules. Collective."""
        self.config, dtype, seed = config, config.model.dtype, config.train.seed
        common: dict[str, Any] = {"dtype": dtype, "seed": seed, "total_steps": updates}
        balance = make_balance(config.model, count_for(config.loss))
        self.actor = Trainer(inputs.source, config.parallel, config.optim, head="lm", balance=balance, **common)
        self.plan = self.critic_plan = training_batch_plan(config, self.actor.groups)
        self.critic: Trainer | None = None
        if config.ppo.estimator_row.needs_critic:
            lr = config.ppo.critic_lr
            optim = replace(config.optim, lr=lr, min_lr=min(config.optim.min_lr, lr))
            source = critic_source(config, inputs.source)
            balance = make_balance(config.model, trained_tokens) if source.spec.experts is not None else None
            groups = state.groups_for(config.critic_parallel)
            self.critic = Trainer(source, config.critic_parallel, optim, head="value", balance=balance, groups=groups,
                                  **common)
            self.critic_plan = training_batch_plan(config, self.critic.groups)
        self.reference: Model | None = None
        if config.kl.coef > 0:
            self.reference = Model(inputs.source, config.parallel, head="lm", dtype=dtype, seed=seed)

    def trainers(self) -> dict[str, Trainer]:
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})

    def parts(self, *, with_optimizer: bool) -> list[Part]:
        """The parts of a checkpoint: the actor at the top level, the critic in critic/."""
        parts = [self.actor.part(with_optimizer=with_optimizer)]
        return parts if self.critic is None else [*parts, self.critic.part("critic", with_optimizer=with_optimizer)]

    def resume(self, path: Path, *, updates_done: int, scheduler: int) -> None:
        self.actor.resume(path, updates_done, scheduler)
        if self.critic is not None:
            self.critic.resume(path / "critic", updates_done, scheduler)

    def batches(self, model: Model, rollout: Rollout, rows: list[int] | range) -> list[MicroBatch]:
        """This rank's micro-batches of the rows, by the process groups of `model`."""
        return micro_batches(rollout, rows, self.critic_plan if model is self.critic else self.plan)

    def logprobs(self, model: Model, rollout: Rollout, *, with_entropy: bool = False) -> list[torch.Tensor]:
        """Log-probs [B, A] of the answers at the rollout's temperature, and with_entropy the entropies [B, A]."""

        def fn(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
            logps_BT, entropy_BT, *_ = model.logprobs(hidden_BTH, batch, temperature=self.config.rollout.temperature,
                                                      with_entropy=with_entropy, keep_BT=batch.mask_BT)
            return torch.stack([logps_BT, entropy_BT]) if with_entropy else logps_BT[None]

        shape = (rollout.size, int(rollout.lengths_B().max()))
        batches = self.batches(model, rollout, range(rollout.size))
        return compute_tables(model, batches, fn, shape=shape, channels=2 if with_entropy else 1)

    def values(self, critic: Trainer, rollout: Rollout) -> torch.Tensor:
        """The critic's values [B, A]: entry t is the value at the position that predicts answer token t."""
        shape = (rollout.size, int(rollout.lengths_B().max()))
        batches = self.batches(critic, rollout, range(rollout.size))
        return compute_tables(critic, batches, lambda v_BT1, batch: v_BT1.squeeze(-1).float()[None], shape=shape)[0]
