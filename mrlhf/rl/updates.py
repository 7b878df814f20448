"""The losses of actor and critic over micro-batches of a rollout, from its per-token tables [B, A], and ptx.

A LossFn returns (sum, count, partials); the trainer divides once, by the count of the whole step (training/trainer.py).
Letters as in rollout/tables.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mrlhf.config.options import PPOStage
from mrlhf.data.blend import Dataset
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.data.order import Mix, Order
from mrlhf.losses import reduce_loss, sum_and_count
from mrlhf.parallel import state
from mrlhf.rl.kl import kl_estimate
from mrlhf.rl.policy_loss import policy_loss, value_loss
from mrlhf.rl.rollout.tables import Rollout, gather_table
from mrlhf.training.batch_plan import make_batch_plan
from mrlhf.training.trainer import LossFn, Model, Partials


def actor_loss(model: Model, config: PPOStage, *, beta: float, old_BA: torch.Tensor, ref_BA: torch.Tensor | None,
               advantages_BA: torch.Tensor, rollout_BA: torch.Tensor) -> LossFn:
    """policy_loss - ppo.entropy_coef x entropy, + beta x KL(actor || reference) where `kl.in_loss`.

    old_BA, ref_BA, rollout_BA: log-probs under the actor before the updates, the reference and vLLM.
    """
    ppo, aggregation, name = config.ppo, config.loss.aggregation, config.rollout.correction
    correction = None if name == "none" else (name, config.rollout.correction_low, config.rollout.correction_high)

    def loss(hidden_BTH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Partials]:
        logps_BT, entropy_BT, *_ = model.logprobs(hidden_BTH, batch, temperature=config.rollout.temperature,
                                                  with_entropy=True, keep_BT=batch.mask_BT)
        segments = {"segment_ids": batch.segments_BT, "num_segments": batch.num_samples + 1}

        def total_of(x_BT: torch.Tensor) -> torch.Tensor:
            return reduce_loss(x_BT, batch.mask_BT, aggregation=aggregation, denominator=1.0, **segments)[0]

        total, partials = policy_loss(
            logps_BT, gather_table(batch, old_BA), gather_table(batch, advantages_BA), batch.mask_BT,
            clip_low=ppo.clip_low, clip_high=ppo.clip_high, dual_clip=ppo.dual_clip, ratio=ppo.ratio,
            aggregation=aggregation, denominator=1.0,
            rollout_logps=gather_table(batch, rollout_BA) if correction else None, correction=correction, **segments,
        )
        if ppo.entropy_coef:
            total = total - ppo.entropy_coef * total_of(entropy_BT)
        if config.kl.in_loss and ref_BA is not None:
            kl_BT = kl_estimate(logps_BT, gather_table(batch, ref_BA), kind=config.kl.kind)
            total = total + beta * total_of(kl_BT)
        count = batch.mask_BT.sum() if aggregation == "token" else batch.weights_N.sum()
        return total, count, {**partials, "entropy": sum_and_count(entropy_BT, batch.mask_BT.bool())}

    return loss


def critic_loss(config: PPOStage, *, old_values_BA: torch.Tensor, returns_BA: torch.Tensor) -> LossFn:
    """value_loss over the answer tokens."""

    def loss(values_BT1: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Partials]:
        total, partials = value_loss(values_BT1.squeeze(-1), gather_table(batch, old_values_BA),
                                     gather_table(batch, returns_BA), batch.mask_BT, clip=config.ppo.value_clip,
                                     denominator=1.0)
        return total, batch.mask_BT.sum(), partials

    return loss


class Pretraining:
    """ptx (InstructGPT, Ouyang 2022, eq. 2): adds ptx.coef x the mean NLL of a data set to the actor's loss.

    The ptx.batch_size rows of update k are a function of (train.seed, k), so that a run resumes exactly. Gradients are
    divided by the policy's count, so the sum of the NLL is scaled by that count over its own number of tokens, both of
    the whole update.
    """

    def __init__(self, config: PPOStage, data: Dataset, groups: state.Groups) -> None:
        self.config = config
        plan = make_batch_plan(groups, packing=config.data.packing, micro_batch_size=config.ptx.micro_batch_size)
        self.loader = Loader(data, plan)
        self.order = Order(
            Mix.single(self.loader.num_rows), global_batch_size=config.ptx.batch_size, num_epochs=1.0,
            max_steps=1 << 40,  # never ends
            seed=config.train.seed + 1, shuffle=True,
        )

    def batches(self, update: int) -> list[MicroBatch]:
        """This rank's micro-batches of update 1, 2, ..."""
        return [replace(batch, ptx=True) for batch in self.loader.micro_batches(self.order.rows(update))]

    def mixed(self, loss: LossFn, model: Model, batches: Sequence[MicroBatch], *, policy_count: float) -> LossFn:
        """`loss` for a rollout's micro-batches, the scaled NLL for `batches`. policy_count: of the update."""
        tokens = state.sum_over_data_parallel(torch.stack([b.mask_BT.sum() for b in batches]).sum())
        scale = self.config.ptx.coef * policy_count / float(tokens)

        def both(hidden_BTH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Partials]:
            if not batch.ptx:
                return loss(hidden_BTH, batch)
            logps_BT, *_ = model.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT)
            nll, ptx_loss = reduce_loss(-logps_BT, batch.mask_BT, denominator=1.0)
            return scale * nll, torch.zeros((), device=nll.device), {"ptx_loss": ptx_loss}

        return both


def policy_count(rollout: Rollout, rows: Sequence[int], aggregation: str) -> float:
    """The sum of `actor_loss`'s counts over an update of these rows, over all ranks."""
    return float(rollout.lengths_B()[list(rows)].sum()) if aggregation == "token" else float(len(rows))
