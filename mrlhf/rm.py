"""Reward model: a scalar head at the token that closes each answer, trained on pairs (Bradley-Terry).

Legend: B rows, T tokens, N samples, P pairs.
"""

from __future__ import annotations

import torch

from mrlhf import supervised
from mrlhf.config import RMStage
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.engine import LossFn, Model, Trainer
from mrlhf.losses import pairwise_loss
from mrlhf.parallel import state


def score_micro_batches(model: Model, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Score of each sample, [N] of every micro-batch: the head's value at its last real token."""
    values = model.forward(batches, lambda values_BT1, batch: values_BT1.squeeze(-1).float()[None], channels=1)
    return [batch.last(v_1BT[0].cpu()) for batch, v_1BT in zip(batches, values, strict=True)]


def reward_loss(trainer: Trainer, loader: Loader, *, kind: str) -> LossFn:
    """Mean over the step's pairs of -log sigmoid(chosen - rejected - margin)."""

    def loss(values_BT1: torch.Tensor, batch: MicroBatch):
        scores_N = batch.last(values_BT1.squeeze(-1))
        chosen, rejected = (i.to(scores_N.device) for i in loader.pairs(batch))
        margin_P = loader.margins(batch)
        weight_P = batch.weights_N[chosen]
        total, partials = pairwise_loss(
            scores_N[chosen],
            scores_N[rejected],
            margin=None if margin_P is None else margin_P.to(scores_N.device),
            kind=kind,
            denominator=1.0,
            weight=weight_P,
        )
        return total, weight_P.sum(), partials

    return loss


def score_statistics(trainer: Trainer, loader: Loader) -> dict[str, float]:
    """Mean and standard deviation of the scores over all answers of a preference set: {"reward_mean", "reward_std", "reward_count"}."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in loader.in_order():
        batches = loader.micro_batches(rows)
        for batch, scores_N in zip(batches, score_micro_batches(trainer, batches), strict=True):
            real = scores_N[batch.weights_N > 0].double()
            sums += torch.stack([real.sum(), (real**2).sum(), torch.tensor(float(len(real)), dtype=torch.float64)])
    sums = state.sum_over_data_parallel(sums)
    mean = float(sums[0] / sums[2])
    return {"reward_mean": mean, "reward_std": max(float(sums[1] / sums[2]) - mean**2, 1e-12) ** 0.5, "reward_count": int(sums[2])}


def main(config: RMStage) -> None:
    def make_loss(trainer: Trainer, loader: Loader) -> LossFn:
        return reward_loss(trainer, loader, kind=config.rm.loss)

    supervised.train("rm", config, head="value", make_loss=make_loss, finish=score_statistics)
