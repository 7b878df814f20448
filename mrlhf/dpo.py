"""Direct preference optimisation against a frozen reference: the model the run starts from.

Legend: B rows, T tokens, H hidden size, N samples, P pairs.
The reference's log-probs are computed once, before the first step, by the policy itself (it still is the
reference then), and kept beside the data (references.py); `dpo.reference: online` keeps a second model instead.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from mrlhf.config.options import DPOStage
from mrlhf.data.blend import sources_of
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.losses import dpo_loss
from mrlhf.models.layers.router_losses import trained_pairs
from mrlhf.parallel import state
from mrlhf.training import run as supervised
from mrlhf.training.reference_cache import fingerprint, stored
from mrlhf.training.trainer import LossFn, Model, Trainer


def answer_logps(model: Model, hidden_BTH: torch.Tensor, batch: MicroBatch, *, mean: bool) -> torch.Tensor:
    """[N]: log-prob of each answer, summed over its trained tokens (or their mean)."""
    logps_BT = model.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT).logps
    sums_N = batch.sum_N(logps_BT * batch.mask_BT)
    return sums_N / batch.sum_N(batch.mask_BT).clamp(min=1) if mean else sums_N


def _logps_of(model: Model, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """[N] of every micro-batch, summed over each answer's trained tokens, without gradient."""

    def per_token(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        logps_BT = model.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT).logps
        return (logps_BT * batch.mask_BT)[None]

    outputs = model.forward(batches, per_token, channels=1)
    return [batch.sum_N(logps_1BT[0].cpu()) for batch, logps_1BT in zip(batches, outputs, strict=True)]


def reference_logps(model: Model, loader: Loader) -> torch.Tensor:
    """[samples of the dataset]: each answer's summed log-prob under the model as it is. Collective; the same on all ranks."""
    found = torch.zeros(loader.dataset.num_samples, dtype=torch.float64)
    for rows in loader.in_order():
        batches = loader.micro_batches(rows)
        for batch, logps_N in zip(batches, _logps_of(model, batches), strict=True):
            real = batch.weights_N > 0
            found[batch.index_N[real]] = logps_N[real].double()
    return state.sum_over_data_parallel(found).float()


def preference_loss(config: DPOStage, trainer: Trainer, loader: Loader, reference: torch.Tensor) -> LossFn:
    """Mean over the step's pairs of the DPO loss, plus nll_coef x mean over pairs of the chosen answer's token mean.

    reference: summed log-prob of every answer of the loader's dataset, by sample index.
    """
    options, mean = config.dpo, config.dpo.length_normalize

    def loss(hidden_BTH: torch.Tensor, batch: MicroBatch):
        policy_N = answer_logps(trainer, hidden_BTH, batch, mean=mean)
        reference_N = reference[batch.index_N.cpu()].to(policy_N.device)
        if mean:
            reference_N = reference_N / batch.sum_N(batch.mask_BT).clamp(min=1)
        chosen, rejected = (i.to(policy_N.device) for i in loader.pairs(batch))
        weight_P = batch.weights_N[chosen]
        total, partials = dpo_loss(
            policy_N[chosen],
            policy_N[rejected],
            reference_N[chosen],
            reference_N[rejected],
            beta=options.beta,
            kind=options.loss,
            label_smoothing=options.label_smoothing,
            denominator=1.0,
            weight=weight_P,
        )
        if options.nll_coef:
            nll_P = -policy_N[chosen] / (1 if mean else batch.sum_N(batch.mask_BT)[chosen].clamp(min=1))
            total = total + options.nll_coef * (nll_P * weight_P).sum()
        return total, weight_P.sum(), partials

    return loss


def main(config: DPOStage) -> int:
    online = config.dpo.reference == "online"
    fingerprints: list[str] = []
    references: dict[str, torch.Tensor] = {}
    frozen: list[Model] = []

    def make_loss(trainer: Trainer, loader: Loader) -> LossFn:
        if online:
            if not frozen:
                frozen.append(Model(trainer.source, config.parallel, head="lm", dtype=config.model.dtype, seed=config.train.seed))
            references[loader.dataset.prefix] = torch.zeros(loader.dataset.num_samples)
        else:
            if not fingerprints:
                fingerprints.append(fingerprint(trainer.source, dtype=config.model.dtype))
            parts = [
                stored(
                    data,
                    reference=fingerprints[0],
                    run_dir=Path(config.train.output_dir),
                    compute=partial(reference_logps, trainer, loader.of(data)),
                    say=supervised.say,
                )
                for data in sources_of(loader.dataset)
            ]
            references[loader.dataset.prefix] = torch.cat(parts)
        return preference_loss(config, trainer, loader, references[loader.dataset.prefix])

    def before_step(loader: Loader, batches: list[MicroBatch]) -> None:
        for batch, logps_N in zip(batches, _logps_of(frozen[0], batches), strict=True):
            references[loader.dataset.prefix][batch.index_N] = logps_N

    return supervised.train("dpo", config, head="lm", make_loss=make_loss, count=trained_pairs, before_step=before_step if online else None)
