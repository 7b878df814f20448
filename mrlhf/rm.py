"""Reward model: a scalar head at the last token of each answer, trained on pairs (Bradley-Terry).

Legend: B rows, T tokens, N samples, P pairs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mrlhf.checkpoint.manifest import write_text
from mrlhf.config.options import RMStage
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.losses import accuracy_by_margin, pairwise_loss
from mrlhf.models.layers.router_losses import trained_pairs
from mrlhf.parallel import state
from mrlhf.training.run import SupervisedRun
from mrlhf.training.trainer import LossFn, Trainer, sample_values, score_micro_batches


def reward_loss(trainer: Trainer, loader: Loader, *, kind: str, by_margin: bool = False) -> LossFn:
    """Mean over the step's pairs of -log sigmoid(chosen - rejected - margin). by_margin: adds `accuracy_by_margin`."""

    def loss(values_BT1: torch.Tensor, batch: MicroBatch):
        scores_N = batch.last(values_BT1.squeeze(-1))
        chosen, rejected = loader.pairs(batch)
        margin_P, weight_P = loader.margins(batch), batch.weights_N[chosen]
        if margin_P is not None:
            margin_P = margin_P.to(weight_P.device, non_blocking=True)
        total, partials = pairwise_loss(scores_N[chosen], scores_N[rejected],
                                        margin=margin_P, kind=kind, denominator=1.0, weight=weight_P)
        if by_margin:
            partials |= accuracy_by_margin(scores_N[chosen], scores_N[rejected], weight=weight_P)
        return total, weight_P.sum(), partials

    return loss


def all_scores(trainer: Trainer, loader: Loader) -> torch.Tensor:
    """Scores, float64 [samples], of a preference set: chosen, rejected, ... The same on all ranks. Collective."""
    return sample_values(loader, partial(score_micro_batches, trainer))


def score_statistics(scores: torch.Tensor) -> dict[str, float]:
    """Mean, (biased) standard deviation and number of all scores: {"reward_mean", "reward_std", "reward_count"}."""
    return {
        "reward_mean": float(scores.mean()),
        "reward_std": max(float(scores.var(correction=0)), 1e-12) ** 0.5,
        "reward_count": len(scores),
    }


def score_histogram(scores: torch.Tensor, *, bins: int = 30) -> dict[str, list[float]]:
    """Counts of chosen and rejected answers by score: {"edges" [bins + 1], "chosen" [bins], "rejected" [bins]}."""
    edges = np.histogram_bin_edges(scores.numpy(), bins)
    counts = {name: np.histogram(scores[at::2].numpy(), edges)[0].tolist()
              for at, name in enumerate(("chosen", "rejected"))}
    return {"edges": edges.tolist(), **counts}


def write_histogram(output_dir: Path, scores: torch.Tensor) -> None:
    """Rank 0 writes rewards.json, for the report."""
    if state.is_main():
        write_text(output_dir / "rewards.json", json.dumps(score_histogram(scores)) + "\n")


def main(config: RMStage) -> int:
    run = SupervisedRun(config, head="value", count=trained_pairs)
    if run.finished:
        return run.close()
    loss_fn = reward_loss(run.trainer, run.loader, kind=config.rm.loss)
    measured = run.loader if run.eval_loader is None else run.eval_loader
    eval_loss_fn = reward_loss(run.trainer, measured, kind=config.rm.loss, by_margin=True)
    for step, batches in run.batches():
        with run.phase("step", step):
            metrics = run.trainer.step(batches, loss_fn)
        run.log_step(step, metrics)
        if run.due_evaluation(step):
            run.evaluate(step, eval_loss_fn)
        if step == run.total_steps:  # users of the model normalize its scores by these statistics
            scores = all_scores(run.trainer, measured)
            write_histogram(run.output_dir, scores)
            run.save(step, score_statistics(scores))
        elif run.due_save(step):
            run.save(step)
    return run.close()
