"""The router: which experts a token goes to, and with which weights.

It replaces Megatron's router, which lacks some variants of the same parts (groups chosen by their best expert, for
one). Legend: T tokens, E experts, K chosen ones, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from mrlhf.models.families.spec import Experts
from mrlhf.models.layers.router_losses import Balancer


def expert_scores(logits_TE: torch.Tensor, experts: Experts) -> torch.Tensor:
    """[T, E] in fp32."""
    return torch.softmax(logits_TE.float(), -1) if experts.score == "softmax" else torch.sigmoid(logits_TE.float())


def choose_experts(
    scores_TE: torch.Tensor, experts: Experts, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the chosen experts [T, K], their weights [T, K]). bias_E changes the choice, not the weights."""
    by_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if experts.groups > 1:
        by_TGE = by_TE.unflatten(-1, (experts.groups, -1))
        of_group_TG = by_TGE.topk(1 if experts.group_score == "best" else 2, dim=-1).values.sum(-1)
        top_TG = of_group_TG.topk(experts.top_groups, dim=-1).indices
        kept_TG = torch.zeros_like(of_group_TG, dtype=torch.bool).scatter(1, top_TG, True)
        by_TE = by_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    chosen_TK = by_TE.topk(experts.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, chosen_TK)
    if experts.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return chosen_TK, weights_TK * experts.weight_scale


class Router(TopKRouter):
    """Routes as `experts` says. The selection bias, where a model has one, is a frozen fp32 parameter."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, *, experts: Experts) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.experts = experts
        self.balancer: Balancer | None = None  # set by a trainer
        self.sample_T: torch.Tensor | None = None  # each token's sample in this forward pass, for the balancer
        if experts.selection_bias:
            self.expert_bias = torch.nn.Parameter(torch.zeros(experts.num, dtype=torch.float32), requires_grad=False)

    def routing(self, logits: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [s, b, E] -> (weights, chosen or not), [s b, E] each."""
        logits_TE = logits.flatten(0, 1)
        scores_TE = expert_scores(logits_TE, self.experts)
        chosen_TK, weights_TK = choose_experts(scores_TE, self.experts, self.expert_bias)
        if self.balancer is not None and self.sample_T is not None and torch.is_grad_enabled():
            group = self.tp_cp_group if self.config.sequence_parallel else self.cp_group
            weights_TK = self.balancer.attach(weights_TK, logits_TE, scores_TE, chosen_TK, self.sample_T, group)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, chosen_TK, weights_TK.to(logits_TE.dtype))
        return weights_TE, torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)


class MoE(MoELayer):
    """`padding_mask`, which Megatron passes through recomputation too, carries each token's sample: [B, T]."""

    def forward(self, hidden_states, intermediate_tensors=None, padding_mask=None):
        samples_BT = padding_mask
        if samples_BT is not None and self.config.sequence_parallel:
            samples_BT = samples_BT.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        self.router.sample_T = None if samples_BT is None else samples_BT.t().reshape(-1)
        return super().forward(hidden_states, intermediate_tensors)
