"""Supervised fine-tuning: cross entropy of the trained tokens (the last assistant turn, by the data's mask).

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from mrlhf.config.options import PretrainStage, SFTStage
from mrlhf.data.loader import MicroBatch
from mrlhf.losses import masked_cross_entropy, reduce_loss, sum_and_count
from mrlhf.models.layers.router_losses import count_for
from mrlhf.training.run import SupervisedRun
from mrlhf.training.trainer import LossFn, Trainer


def language_model_loss(trainer: Trainer, *, aggregation: str, z_loss: float = 0.0) -> LossFn:
    """-log p of each trained token given those before it in its sample; the mean is over the step's tokens or
    sequences.

    It is weighted by what a sample counts (`loss_weight` of its source): sum of weight x loss / sum of weights. z_loss:
    weight of the mean of log(sum of exp(logits))^2 beside it (PaLM, section 5), which keeps logits from drifting.
    """

    def loss(hidden_BTH: torch.Tensor, batch: MicroBatch):
        logps_BT, entropy_BT, is_top_BT, log_z_BT = trainer.logprobs(hidden_BTH, batch, with_entropy=True,
                                                                     keep_BT=batch.mask_BT)
        weight_BT = torch.cat([batch.weights_N, batch.weights_N.new_zeros(1)])[batch.segments_BT]
        over: dict[str, Any] = {"denominator": 1.0, "aggregation": aggregation, "weight": weight_BT}
        over |= {"segment_ids": batch.segments_BT, "num_segments": batch.num_samples + 1}
        total = masked_cross_entropy(logps_BT, batch.mask_BT, **over)
        if z_loss:
            total = total + z_loss * reduce_loss(log_z_BT.square(), batch.mask_BT, **over)[0]
        keep_BT = batch.mask_BT.bool()
        tokens = keep_BT.sum()
        has_tokens_N = batch.sum_N(batch.mask_BT) > 0
        count = (weight_BT * batch.mask_BT).sum() if aggregation == "token" else (batch.weights_N * has_tokens_N).sum()
        partials = {
            "mean_token_accuracy": sum_and_count(is_top_BT, keep_BT),
            "perplexity": sum_and_count(-logps_BT, keep_BT),
            "entropy": sum_and_count(entropy_BT, keep_BT),
            **({"log_z_squared": sum_and_count(log_z_BT.square(), keep_BT)} if z_loss else {}),
            "num_tokens": torch.stack([tokens.float(), torch.ones_like(tokens, dtype=torch.float32)]),
        }
        return total, count, partials

    return loss


def main(config: SFTStage) -> int:
    return train(config)


def train(config: SFTStage | PretrainStage) -> int:
    """The loop of sft and pretrain; returns the exit status."""
    run = SupervisedRun(config, head="lm", count=count_for(config.loss))
    if run.finished:
        return run.close()
    loss_fn = language_model_loss(run.trainer, aggregation=config.loss.aggregation, z_loss=config.loss.z_loss)
    for step, batches in run.batches():
        with run.phase("step", step):
            metrics = run.trainer.step(batches, loss_fn)
        run.log_step(step, metrics)
        if run.due_evaluation(step):
            run.evaluate(step, loss_fn)
        if run.due_save(step):
            run.save(step)
    return run.close()
