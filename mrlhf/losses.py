"""Losses of pretrain, SFT, reward model and DPO, and the reductions that PPO shares.

Every loss is `sum / denominator`. The denominator is the number of items in the *whole optimizer step* (all
micro-batches, data- and context-parallel ranks). The caller counts and passes it, or passes 1 to get the sum; None
means the items of this call.

Metrics are detached `[sum, count]` tensors: added over micro-batches and ranks, then divided, they give the exact mean.
The few that are reduced by min or max instead say so and hold `[value, 1]`.

Letters: B samples (rows), T tokens, P pairs, S sequences (B rows, or the segments of packed rows).
The maths is fp32 for any input dtype; values in masked positions, NaN included, are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mrlhf.errors import ConfigError

Metrics = dict[str, Tensor]


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r} is unknown", expected=", ".join(allowed))


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors have the same shape: broadcasting would hide a bug."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def fill_masked(x: Tensor, keep: Tensor) -> Tensor:
    """fp32 `x` with 0 where `keep` (bool, same shape) is False; no value or gradient passes from there."""
    return x.float().masked_fill(~keep, 0.0)


def sum_and_count(x: Tensor, keep: Tensor) -> Tensor:
    """The metric `[sum of x over keep, number kept]`, detached fp32 [2]."""
    return torch.stack([fill_masked(x.detach(), keep).sum(), keep.sum().float()])


def sequence_means(
    x: Tensor, mask: Tensor, *, segment_ids: Tensor | None = None, num_segments: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of `x` [B, T] over the masked-in tokens of each sequence.

    Without `segment_ids` a row is a sequence. segment_ids (long, [B, T]): the packed sequence of each token, 0 to
    num_segments - 1; any value where the mask is 0.

    Returns (mean_S, has_tokens_S): a sequence without masked-in tokens has mean 0 and has_tokens False.
    Raises ValueError if segment_ids come without num_segments or if shapes differ.
    """
    check_same_shape(x=x, mask=mask, segment_ids=segment_ids)
    keep = mask.bool()
    kept = fill_masked(x, keep)
    if segment_ids is None:
        sum_S, count_S = kept.sum(-1), keep.sum(-1).float()
    else:
        if num_segments is None:
            raise ValueError("segment_ids need num_segments")
        index = segment_ids.masked_fill(~keep, 0).flatten()
        zeros_S = torch.zeros(num_segments, dtype=torch.float32, device=x.device)
        sum_S = zeros_S.index_add(0, index, kept.flatten())
        count_S = zeros_S.index_add(0, index, keep.flatten().float())
    return sum_S / count_S.clamp(min=1), count_S > 0


def reduce_loss(
    x: Tensor, mask: Tensor, *, aggregation: str = "token", denominator: Tensor | float | None = None,
    weight: Tensor | None = None, segment_ids: Tensor | None = None, num_segments: int | None = None
) -> tuple[Tensor, Tensor]:
    """Reduces per-token losses x [B, T] to a scalar.

    aggregation "token": sum over masked-in tokens / denominator (number of these tokens).
    aggregation "sequence": sum of the sequences' token means / denominator (number of sequences with a masked-in
        token).
    weight [B, T], the same for all tokens of a sequence: the sum of tokens (sequences) is weighted, and the count is
        the sum of weights.
    segment_ids, num_segments: see `sequence_means`; used by "sequence" only.

    Returns (loss, [sum, count]); the second is detached and not divided. Without a masked-in token the loss is a
    differentiable 0.
    Raises ConfigError for an unknown aggregation, ValueError if shapes differ.
    """
    check_choice("aggregation", aggregation, ("token", "sequence"))
    check_same_shape(x=x, mask=mask)
    if aggregation == "token":
        items, keep = x, mask.bool()
    else:
        items, keep = sequence_means(x, mask, segment_ids=segment_ids, num_segments=num_segments)
    kept, count = fill_masked(items, keep), keep.sum().float()
    if weight is not None:
        check_same_shape(x=x, weight=weight)
        if aggregation == "sequence":
            weight, _ = sequence_means(weight, mask, segment_ids=segment_ids, num_segments=num_segments)
        kept_weight = fill_masked(weight, keep)
        kept, count = kept * kept_weight, kept_weight.sum()
    total = kept.sum()
    loss = total / (torch.where(count > 0, count, 1.0) if denominator is None else denominator)
    return loss, torch.stack([total.detach(), count])


def masked_cross_entropy(logps: Tensor, mask: Tensor, *, denominator: Tensor | float | None = None,
                         aggregation: str = "token", weight: Tensor | None = None, segment_ids: Tensor | None = None,
                         num_segments: int | None = None) -> Tensor:
    """Cross entropy -log p(target) over the trained tokens, in nats; a scalar.

    logps [B, T]: log-prob of the target of each position. mask [B, T]: 1 where that target is trained.
    denominator: trained tokens of the whole optimizer step, or its sequences with aggregation="sequence" (mean of
    per-sequence means). segment_ids [B, T], num_segments: the sequence of each token in packed rows, see
    `sequence_means`; this call must hold whole sequences.
    weight [B, T]: the loss is sum(weight x loss) / sum(weight), and `denominator` is the second sum, see `reduce_loss`.

    Raises ConfigError for an unknown aggregation, ValueError if shapes differ.
    """
    return reduce_loss(-logps, mask, aggregation=aggregation, denominator=denominator, weight=weight,
                       segment_ids=segment_ids, num_segments=num_segments)[0]


def _rounding(*terms: Tensor) -> Tensor:
    """What fp32 rounding of the terms can make of a sum of them that is 0."""
    return 1e-6 * torch.stack(terms).detach().abs().sum(0)


def pairwise_loss(chosen_B: Tensor, rejected_B: Tensor, *, margin: Tensor | float | None = None, kind: str = "sigmoid",
                  denominator: Tensor | float | None = None, weight: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Bradley-Terry loss of a reward model over P pairs (InstructGPT, Ouyang 2022, eq. 1; margin: Llama 2, eq. 2).

    chosen_B, rejected_B [P]: scores; d = chosen - rejected - margin. margin: [P] or a number.
    kind: "sigmoid" -log sigmoid(d), "logexp" log(1 + exp(-d)): the same function in two forms, both safe for any d.
    weight [P]: 1 for a pair, 0 for a padding pair, which is not counted. denominator: pairs of the whole step.

    Returns (loss, metrics): accuracy (share with chosen > rejected by more than rounding), margin (chosen - rejected),
    mean_reward (over both) as [sum, count]; min_reward and max_reward as [value, 1], reduced by min and max (+inf and
    -inf if all pairs are padding).
    Raises ConfigError for an unknown kind, ValueError if shapes differ.
    """
    check_choice("kind", kind, ("sigmoid", "logexp"))
    margin_B = margin if isinstance(margin, Tensor) and margin.dim() else None
    check_same_shape(chosen=chosen_B, rejected=rejected_B, margin=margin_B, weight=weight)
    keep = torch.ones_like(chosen_B, dtype=torch.bool) if weight is None else weight.bool()
    chosen_P, rejected_P = fill_masked(chosen_B, keep), fill_masked(rejected_B, keep)
    difference_P = chosen_P - rejected_P
    logit_P = difference_P if margin is None else difference_P - margin
    loss_P = -F.logsigmoid(logit_P) if kind == "sigmoid" else torch.logaddexp(torch.zeros_like(logit_P), -logit_P)
    loss, _ = reduce_loss(loss_P, keep, denominator=denominator)

    scores_2P, keep_2P = torch.cat([chosen_P, rejected_P]).detach(), torch.cat([keep, keep])
    one = torch.ones((), device=scores_2P.device)
    metrics = {
        "accuracy": sum_and_count(difference_P > _rounding(chosen_P, rejected_P), keep),
        "margin": sum_and_count(difference_P, keep),
        "mean_reward": sum_and_count(scores_2P, keep_2P),
        "min_reward": torch.stack([scores_2P.masked_fill(~keep_2P, torch.inf).amin(), one]),
        "max_reward": torch.stack([scores_2P.masked_fill(~keep_2P, -torch.inf).amax(), one]),
    }
    return loss, metrics


MARGIN_EDGES = (0.0, 0.5, 1.0, 2.0, float("inf"))


def accuracy_by_margin(chosen_P: Tensor, rejected_P: Tensor, *, weight: Tensor) -> Metrics:
    """A reward model's accuracy by the difference of the two scores: accuracy_by_margin/0-0.5 ... /2+ as [sum, count].

    chosen_P, rejected_P, weight [P]: see `pairwise_loss`. By Bradley-Terry a difference m means a probability of
    sigmoid(m): a calibrated model is right for 0.50 to 0.62, 0.62 to 0.73, 0.73 to 0.88 and 0.88 to 1 of the pairs in
    these buckets.
    """
    keep, difference_P = weight.bool(), (chosen_P - rejected_P).detach()
    metrics = {}
    for low, high in zip(MARGIN_EDGES, MARGIN_EDGES[1:], strict=False):
        inside = keep & (difference_P.abs() >= low) & (difference_P.abs() < high)
        name = f"{low:g}-{high:g}" if high < float("inf") else f"{low:g}+"
        is_right_P = difference_P > _rounding(chosen_P, rejected_P)
        metrics[f"accuracy_by_margin/{name}"] = sum_and_count(is_right_P, inside)
    return metrics


def dpo_loss(
    pc_B: Tensor, pr_B: Tensor, rc_B: Tensor, rr_B: Tensor, *, beta: float, kind: str = "sigmoid",
    label_smoothing: float = 0.0, denominator: Tensor | float | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimization over P pairs, from log-probs *summed* over each answer's tokens (Rafailov 2023).

    d = (pc - pr) - (rc - rr). pc_B, pr_B [P]: policy, chosen and rejected. rc_B, rr_B [P]: reference.
    kind: "sigmoid" -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), e = label_smoothing (eq. 7; cDPO),
          "ipo" (d - 1 / (2 beta))^2 (Azar 2023, eq. 17), "hinge" max(0, 1 - beta d) (SLiC, Zhao 2023).
          For length-normalized ipo pass means instead of sums.
    weight [P]: 0 for a padding pair, which is not counted. denominator: pairs of the whole optimizer step.

    Returns (loss, metrics): rewards/{chosen,rejected} = beta (policy - reference), rewards/margins, rewards/accuracies
    (share with d above its rounding), logps/{chosen,rejected}, all [sum, count]. With policy == reference the sigmoid
    loss is ln 2.
    Raises ConfigError for an unknown kind, beta <= 0 or a label_smoothing that does not apply; ValueError if shapes
    differ.
    """
    check_choice("kind", kind, ("sigmoid", "ipo", "hinge"))
    if not beta > 0:
        raise ConfigError(f"beta = {beta} is not positive", expected="a number > 0, usually 0.01 to 0.5")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing = {label_smoothing} is out of range", expected="0 <= label_smoothing < 0.5")
    if label_smoothing and kind != "sigmoid":
        what = f"label_smoothing = {label_smoothing} has no meaning for kind = {kind!r}"
        raise ConfigError(what, expected="0, or kind 'sigmoid'")
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "weight")
    check_same_shape(**dict(zip(names, (pc_B, pr_B, rc_B, rr_B, weight), strict=True)))

    keep = torch.ones_like(pc_B, dtype=torch.bool) if weight is None else weight.bool()
    pc_P, pr_P, rc_P, rr_P = (fill_masked(x, keep) for x in (pc_B, pr_B, rc_B, rr_B))
    # policy - reference first: they are close, so fp32 keeps the digits that chosen - rejected (hundreds of nats) loses
    chosen_P, rejected_P = pc_P - rc_P, pr_P - rr_P
    d_P = chosen_P - rejected_P
    if kind == "sigmoid":
        loss_P = -(1 - label_smoothing) * F.logsigmoid(beta * d_P) - label_smoothing * F.logsigmoid(-beta * d_P)
    elif kind == "ipo":
        loss_P = (d_P - 1 / (2 * beta)) ** 2
    else:
        loss_P = torch.relu(1 - beta * d_P)
    loss, _ = reduce_loss(loss_P, keep, denominator=denominator)
    metrics = {
        "rewards/chosen": sum_and_count(beta * chosen_P, keep),
        "rewards/rejected": sum_and_count(beta * rejected_P, keep),
        "rewards/margins": sum_and_count(beta * d_P, keep),
        "rewards/accuracies": sum_and_count(d_P > _rounding(pc_P, pr_P, rc_P, rr_P), keep),
        "logps/chosen": sum_and_count(pc_P, keep),
        "logps/rejected": sum_and_count(pr_P, keep),
    }
    return loss, metrics
