"""Auxiliary losses of routers: load balancing (Switch Transformer, eq. 4 to 6) and z-loss (ST-MoE, eq. 5).

Every layer with experts adds to a stage's loss:

  aux_coeff x the mean over the step's tokens of  E sum_e f_e p_e
              f_e: share of the K choices of the token's *sample* that fell on e;  p_e: the token's score for e,
              normalised to sum 1
  z_coeff   x the mean over the step's tokens of  log(sum_e exp(logit_e))^2

The first is eq. 4 with one sample as the papers' "batch", averaged over samples by length. For K = 1 it is 1 if the
experts are chosen equally often and E if one is always chosen. Over a whole batch of tokens the number would depend on
how micro-batches and ranks cut it; a sample is never cut, so neither loss depends on micro-batches, packing or ranks.
Padding does not count; prompt tokens do.

Legend: T tokens, E experts, K choices a token, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.config.options import LossConfig, ModelConfig
from mrlhf.data.loader import MicroBatch
from mrlhf.parallel import device

Count = Callable[[MicroBatch], torch.Tensor]


def _weights_BT(batch: MicroBatch) -> torch.Tensor:
    """Weight of each token's sample; 0 at padding."""
    return torch.cat([batch.weights_N, batch.weights_N.new_zeros(1)])[batch.segments_BT]


def trained_tokens(batch: MicroBatch) -> torch.Tensor:
    return (_weights_BT(batch) * batch.mask_BT).sum()


def trained_samples(batch: MicroBatch) -> torch.Tensor:
    return (batch.weights_N * (batch.sum_N(batch.mask_BT) > 0)).sum()


def count_for(loss: LossConfig) -> Count:
    return trained_tokens if loss.aggregation == "token" else trained_samples


def trained_pairs(batch: MicroBatch) -> torch.Tensor:
    return batch.weights_N.sum() / 2


@dataclass(frozen=True)
class Balance:
    """Coefficients of the two losses. count: a micro-batch's count by which the stage's loss is divided."""

    aux_coeff: float
    z_coeff: float
    count: Count = trained_tokens


def make_balance(model: ModelConfig, count: Count) -> Balance | None:
    """None if the configuration asks for neither loss."""
    if not (model.moe_aux_loss_coeff or model.moe_z_loss_coeff):
        return None
    return Balance(model.moe_aux_loss_coeff, model.moe_z_loss_coeff, count)


def balance_summary(model: ModelConfig) -> str:
    """One line for the start of a run of a model with experts."""
    if not (model.moe_aux_loss_coeff or model.moe_z_loss_coeff):
        return "experts: trained without a load-balancing loss (model.moe_aux_loss_coeff)"
    return f"experts: load-balancing loss x {model.moe_aux_loss_coeff:g}, router z-loss x {model.moe_z_loss_coeff:g}"


def token_samples(batch: MicroBatch) -> torch.Tensor:
    """[B, T]: index of each token's sample; -1 at padding and fillers."""
    return torch.where(_weights_BT(batch) > 0, batch.segments_BT, -1)


def balancing_sum(
    scores_TE: torch.Tensor, chosen_TK: torch.Tensor, sample_T: torch.Tensor, *, samples: int, group: Any = None
) -> torch.Tensor:
    """Sum over this rank's tokens of E sum_e f_e p_e. samples: as many as there are, or more (a number of the host's:
    the layer must not wait for the device). group: the ranks that share a sample's tokens.
    """
    tokens, experts = scores_TE.shape
    real_T, rows = sample_T >= 0, sample_T.clamp(min=0)
    counts_SE = scores_TE.new_zeros(samples, experts, dtype=torch.float32)
    ones_TE = torch.zeros(tokens, experts, dtype=torch.float32, device=scores_TE.device).scatter(1, chosen_TK, 1.0)
    counts_SE.index_add_(0, rows, ones_TE * real_T[:, None])
    if group is not None and group.size() > 1:
        dist.all_reduce(counts_SE, group=group)
    share_SE = counts_SE / counts_SE.sum(-1, keepdim=True).clamp(min=1)
    p_TE = scores_TE.float() / scores_TE.float().sum(-1, keepdim=True)
    return experts * ((share_SE[rows] * p_TE).sum(-1) * real_T).sum()


def z_sum(logits_TE: torch.Tensor, sample_T: torch.Tensor) -> torch.Tensor:
    """Sum over this rank's tokens of log(sum of exp(logits))^2."""
    return (torch.logsumexp(logits_TE.float(), -1).square() * (sample_T >= 0)).sum()


class _Attach(torch.autograd.Function):
    """Returns `x`; in backward `loss` gets gradient 1."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), device=grad.device)


class Balancer:
    """The losses of one router: `attach` adds them to its backward pass and sums them for the log."""

    def __init__(self, balance: Balance) -> None:
        self.balance, self.scale = balance, 0.0
        self.samples = 0  # at most so many in a micro-batch of the step
        self.sums = torch.zeros(2, dtype=torch.float64, device=device.current().name)

    def attach(self, weights: torch.Tensor, logits_TE: torch.Tensor, scores_TE: torch.Tensor, chosen_TK: torch.Tensor,
               sample_T: torch.Tensor, group: Any) -> torch.Tensor:
        aux = balancing_sum(scores_TE, chosen_TK, sample_T, samples=self.samples, group=group)
        z = z_sum(logits_TE, sample_T)
        self.sums += torch.stack([aux, z]).detach()
        return _Attach.apply(weights, self.scale * (self.balance.aux_coeff * aux + self.balance.z_coeff * z))


class StepBalance:
    """The losses of all routers of this rank over one optimizer step."""

    def __init__(self, balance: Balance, balancers: list[Balancer], *, layers: int, dp_cp: dist.ProcessGroup) -> None:
        self.balance, self.balancers, self.layers, self.dp_cp = balance, balancers, layers, dp_cp
        self._tokens = self._count = 0.0

    def start_step(self, parts: Iterable[MicroBatch]) -> None:
        """Collective. parts: this rank's parts of the step's micro-batches.

        The schedule sums gradients and divides them by the stage's count; these losses are means over tokens, so they
        are scaled here.
        """
        totals, samples = torch.zeros(2, dtype=torch.float64, device=device.current().name), 1
        for batch in parts:
            tokens, count = (token_samples(batch) >= 0).sum(), self.balance.count(batch)
            totals += torch.stack([tokens.double(), count.double()])
            samples = max(samples, batch.num_samples)
        self._tokens, self._count = _summed(totals, self.dp_cp)
        for balancer in self.balancers:
            balancer.scale, balancer.samples = self._count / max(1.0, self._tokens), samples
            balancer.sums.zero_()

    def finish_step(self, count: float) -> dict[str, float]:
        """Collective. Means over tokens and layers. count: the step's count by the stage's loss function."""
        assert abs(count - self._count) <= 1e-4 * self._count, (count, self._count)
        zeros = torch.zeros(2, dtype=torch.float64, device=device.current().name)
        sums = _summed(sum((b.sums for b in self.balancers), zeros), None)
        aux, z = (x / (max(1.0, self._tokens) * self.layers) for x in sums)
        return {"moe_aux_loss": aux, "moe_z_loss": z}


def _summed(x: torch.Tensor, group: Any) -> list[float]:
    """The one place of a step where the host waits for these losses."""
    dist.all_reduce(x, group=group)
    return x.tolist()
