"""Direct preference optimisation against a frozen reference: the model that the run starts from.

Legend: B rows, T tokens, H hidden size, N samples, P pairs.
Before the first step the policy, which then still equals the reference, computes the reference's log-probs once, and
training/reference_cache.py stores them beside the data. `dpo.reference: online` keeps a second model instead.
"""

from __future__ import annotations

from functools import partial

import torch

from mrlhf.config.options import DPOStage
from mrlhf.data.blend import sources_of
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.losses import dpo_loss
from mrlhf.models.layers.router_losses import trained_pairs
from mrlhf.training.reference_cache import cached_logps, model_fingerprint
from mrlhf.training.run import SupervisedRun
from mrlhf.training.trainer import LossFn, Model, Trainer, sample_values


def answer_logps(model: Model, hidden_BTH: torch.Tensor, batch: MicroBatch, *, mean: bool) -> torch.Tensor:
    """Log-prob [N] of each answer: the sum over its trained tokens, or their mean."""
    logps_BT = model.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT).logps
    sums_N = batch.sum_N(logps_BT * batch.mask_BT)
    return sums_N / batch.sum_N(batch.mask_BT).clamp(min=1) if mean else sums_N


def _logps_of(model: Model, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Log-probs [N] of every micro-batch, summed over each answer's trained tokens, without gradient."""

    def per_token(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        logps_BT = model.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT).logps
        return (logps_BT * batch.mask_BT)[None]

    outputs = model.forward(batches, per_token, channels=1)
    return [batch.sum_N(logps_1BT[0].cpu()) for batch, logps_1BT in zip(batches, outputs, strict=True)]


def reference_logps(model: Model, loader: Loader) -> torch.Tensor:
    """Summed log-prob [samples] of each answer of the data set, under `model`. The same on all ranks. Collective."""
    return sample_values(loader, partial(_logps_of, model)).float()


def preference_loss(config: DPOStage, trainer: Trainer, loader: Loader, reference: torch.Tensor) -> LossFn:
    """Mean over the step's pairs of the DPO loss, plus nll_coef x mean over pairs of the chosen answer's token mean.

    reference: summed log-prob of every answer of the loader's dataset, by sample index.
    """
    options, mean = config.dpo, config.dpo.length_normalize

    def loss(hidden_BTH: torch.Tensor, batch: MicroBatch):
        policy_N = answer_logps(trainer, hidden_BTH, batch, mean=mean)
        reference_N = reference[batch.index_N].to(policy_N.device, non_blocking=True)
        if mean:
            reference_N = reference_N / batch.sum_N(batch.mask_BT).clamp(min=1)
        chosen, rejected = (i.to(policy_N.device) for i in loader.pairs(batch))
        weight_P = batch.weights_N[chosen]
        total, partials = dpo_loss(policy_N[chosen], policy_N[rejected], reference_N[chosen], reference_N[rejected],
                                   beta=options.beta, kind=options.loss, label_smoothing=options.label_smoothing,
                                   denominator=1.0, weight=weight_P)
        if options.nll_coef:
            nll_P = -policy_N[chosen] / (1 if mean else batch.sum_N(batch.mask_BT)[chosen].clamp(min=1))
            total = total + options.nll_coef * (nll_P * weight_P).sum()
        return total, weight_P.sum(), partials

    return loss


class Reference:
    """Summed log-probs of every answer under the reference, by sample index of a data set.

    precompute: the policy computes them once, before its first update, and they are stored beside the data. online: a
    second model computes them step by step (`update`).
    """

    def __init__(self, run: SupervisedRun, config: DPOStage) -> None:
        self.run, source, dtype = run, run.trainer.source, config.model.dtype
        self.model: Model | None = None
        self.fingerprint = ""
        if config.dpo.reference == "online":
            self.model = Model(source, config.parallel, head="lm", dtype=dtype, seed=config.train.seed)
        else:
            self.fingerprint = model_fingerprint(source, dtype=dtype)

    def logps(self, loader: Loader) -> torch.Tensor:
        """Log-probs [samples] of the loader's data set. online: zeros, which `update` replaces."""
        if self.model is not None:
            return torch.zeros(loader.dataset.num_samples)
        trainer, run_dir = self.run.trainer, self.run.output_dir
        return torch.cat([cached_logps(data, reference=self.fingerprint, run_dir=run_dir,
                                 compute=partial(reference_logps, trainer, Loader(data, loader.plan)))
                          for data in sources_of(loader.dataset)])

    def update(self, logps: torch.Tensor, batches: list[MicroBatch]) -> None:
        """online: writes the log-probs of these micro-batches' answers into `logps`."""
        if self.model is not None:
            for batch, logps_N in zip(batches, _logps_of(self.model, batches), strict=True):
                logps[batch.index_N] = logps_N


def main(config: DPOStage) -> int:
    run = SupervisedRun(config, head="lm", count=trained_pairs)
    if run.finished:
        return run.close()
    with run.phase("prepare"):
        reference = Reference(run, config)
        logps = reference.logps(run.loader)
        eval_logps = logps if run.eval_loader is None else reference.logps(run.eval_loader)
    loss_fn = preference_loss(config, run.trainer, run.loader, logps)
    eval_loss_fn = preference_loss(config, run.trainer, run.eval_loader or run.loader, eval_logps)
    for step, batches in run.batches():
        with run.phase("step", step):
            reference.update(logps, batches)
            metrics = run.trainer.step(batches, loss_fn)
        run.log_step(step, metrics)
        if run.due_evaluation(step):
            run.evaluate(step, eval_loss_fn, partial(reference.update, eval_logps))
        if run.due_save(step):
            run.save(step)
    return run.close()
