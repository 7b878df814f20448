"""From scores to advantages: token rewards, GAE, discounted returns, group baselines, whitening.

Letters: B answers (rows), T tokens, G groups of N answers to one prompt.
Masks are 1 on answer tokens. These are contiguous in a row but start anywhere: the prompt stands before, pads after.
Values in masked-out positions, NaN included, are ignored and returned as 0. All maths is fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mrlhf.errors import ConfigError
from mrlhf.losses import check_choice, check_same_shape, fill_masked
from mrlhf.rl.estimators import ESTIMATORS
from mrlhf.rl.shaping import EQUAL_TOLERANCE, VARIANCE_FLOOR, equal_groups, is_rounding

GRPO_EPSILON = 1e-6


def token_rewards(scores_B: Tensor, kl: Tensor, mask: Tensor, *, beta: float, clip: float | None = None) -> Tensor:
    """r_t = -beta kl_t on every answer token, plus the score on the last one (Ziegler 2019, eq. 2). Returns [B, T].

    scores_B [B]: one score per answer, clipped to +-clip if given. kl [B, T]: per-token estimate against the reference.
    A row without answer tokens (a padding row) gets zeros.
    Raises ConfigError if clip <= 0, ValueError if shapes differ.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"reward clip = {clip} is not positive", expected="a number > 0, or null for no clip")
    check_same_shape(kl=kl, mask=mask)
    if scores_B.shape != mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores_B.shape)} do not fit mask {tuple(mask.shape)}")
    keep = mask.bool()
    score_B = scores_B.float() if clip is None else scores_B.float().clamp(-clip, clip)
    answer_tokens_from_here = keep.flip(1).cumsum(1).flip(1)
    is_last = keep & (answer_tokens_from_here == 1)
    return -beta * fill_masked(kl, keep) + fill_masked(score_B[:, None].expand_as(kl), is_last)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman 2016, eq. 16), all [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t + V_t. t + 1 is the next answer
    token of the row; V past the last one is 0. O(B T log T) work in O(log T) steps.
    Returns (advantages, returns). Raises ValueError if shapes differ.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    keep = mask.bool()
    rewards_BT, values_BT = fill_masked(rewards, keep), fill_masked(values, keep)
    value_from_here_BT = _scan_from_end(values_BT, (~keep).float())
    next_values_BT = F.pad(value_from_here_BT[:, 1:], (0, 1))
    deltas_BT = fill_masked(rewards_BT + gamma * next_values_BT - values_BT, keep)
    advantages_BT = fill_masked(_scan_from_end(deltas_BT, _decay(keep, gamma * lam)), keep)
    return advantages_BT, advantages_BT + values_BT


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over the answer tokens of each row, [B, T] (REINFORCE++, Hu 2025).

    The same as `gae` with V = 0 and lam = 1. Raises ValueError if shapes differ.
    """
    check_same_shape(rewards=rewards, mask=mask)
    keep = mask.bool()
    return fill_masked(_scan_from_end(fill_masked(rewards, keep), _decay(keep, gamma)), keep)


def whiten(x: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """(x - mean) / sqrt(max(variance, 1e-8)) over the masked-in positions, 0 elsewhere. [B, T] or [B].

    Numbers that differ by rounding alone give 0.
    The variance is biased (divided by the count). With `group` the statistics run over the tokens of all its ranks
    (collective; shapes may differ): an all-reduce of two numbers, then one of the squares centred on the global mean,
    so that the result does not depend on how rows are spread over ranks. Pass the data-parallel group: ranks that hold
    the same rows must not count twice.
    """
    check_same_shape(x=x, mask=mask)
    keep = mask.bool()
    x_BT = fill_masked(x, keep)
    sum_and_count = torch.stack([x_BT.sum(dtype=torch.float64), keep.sum().double()])
    if group is not None:
        dist.all_reduce(sum_and_count, group=group)
    count = sum_and_count[1].clamp(min=1)
    mean = sum_and_count[0] / count
    centred_BT = fill_masked(x_BT - mean.float(), keep)
    squares = centred_BT.square().sum(dtype=torch.float64)
    if group is not None:
        dist.all_reduce(squares, group=group)
    variance = squares / count
    scale = variance.clamp(min=VARIANCE_FLOOR).rsqrt().masked_fill(is_rounding(variance.sqrt(), mean), 0.0)
    return centred_BT * scale.float()


def no_baseline(scores_GN: Tensor) -> Tensor:
    """r (REINFORCE++, Hu 2025)."""
    return scores_GN


def minus_group_mean(scores_GN: Tensor) -> Tensor:
    """r - mean (Dr. GRPO, Liu 2025; REINFORCE++-baseline, Hu 2025, which whitens it afterwards)."""
    return scores_GN - scores_GN.mean(1, keepdim=True)


def minus_mean_of_others(scores_GN: Tensor) -> Tensor:
    """r - mean of the other answers (RLOO, Ahmadian 2024)."""
    group_size = scores_GN.size(1)
    return minus_group_mean(scores_GN) * (group_size / (group_size - 1))


def standardized_in_group(scores_GN: Tensor) -> Tensor:
    """(r - mean) / (unbiased std + 1e-6) (GRPO, Shao 2024)."""
    return minus_group_mean(scores_GN) / (scores_GN.std(1, keepdim=True, unbiased=True) + GRPO_EPSILON)


def group_scores(scores_B: Tensor, *, estimator: str, group_size: int, tolerance: float = EQUAL_TOLERANCE) -> Tensor:
    """Scores shaped by a critic-free estimator of rl/estimators.py, such as `rloo`. [B] -> [B] fp32.

    scores_B: the group_size answers to one prompt stand next to each other. A group of equal scores (`equal_groups`)
    gives exactly 0 where the estimator compares the answers to one prompt.

    Raises ConfigError for an unknown estimator, and for a group_size below 2 (1 without comparison) or that does not
    divide B.
    """
    check_choice("estimator", estimator, [row.name for row in ESTIMATORS.values() if not row.needs_critic])
    row = ESTIMATORS[estimator]
    smallest = 2 if row.needs_groups else 1
    if group_size < smallest:
        raise ConfigError(f"group size {group_size} is too small for estimator {estimator!r}",
                          expected=f"at least {smallest} answers per prompt",
                          fix="sample more answers per prompt, or use estimator 'reinforce'")
    if scores_B.dim() != 1 or scores_B.numel() % group_size:
        raise ConfigError(f"scores of shape {tuple(scores_B.shape)} do not split into groups of {group_size}",
                          expected=f"[B] with B a multiple of {group_size}")
    scores_GN = scores_B.float().view(-1, group_size)
    shaped_GN = row.resolve()(scores_GN)
    if row.needs_groups:
        equal_G = equal_groups(scores_B, group_size=group_size, tolerance=tolerance)
        shaped_GN = shaped_GN.masked_fill(equal_G[:, None], 0.0)
    return shaped_GN.flatten()


def compute_advantages(
    scores_B: Tensor, kl: Tensor, values: Tensor | None, mask: Tensor, *, estimator: str, group_size: int,
    beta: float, clip: float, gamma: float, lam: float, tolerance: float = EQUAL_TOLERANCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, token rewards) of a rollout by an estimator of rl/estimators.py, [B, T] each, not yet
    whitened.

    scores_B [B]: one score per answer, clipped here. kl [B, T]: per token. values [B, T]: needed by an estimator with a
    critic. Without a critic returns = advantages. tolerance: see `equal_groups`.
    """
    if ESTIMATORS[estimator].needs_critic:
        rewards_BT = token_rewards(scores_B, kl, mask, beta=beta, clip=clip)
        advantages_BT, returns_BT = ESTIMATORS[estimator].resolve()(rewards_BT, values, mask, gamma=gamma, lam=lam)
        return advantages_BT, returns_BT, rewards_BT
    shaped_B = group_scores(scores_B.clamp(-clip, clip), estimator=estimator, group_size=group_size,
                            tolerance=tolerance)
    rewards_BT = token_rewards(shaped_B, kl, mask, beta=beta)
    returns_BT = discounted_returns(rewards_BT, mask, gamma=gamma)
    return returns_BT, returns_BT, rewards_BT


def _decay(keep: Tensor, factor: float) -> Tensor:
    """`factor` on answer tokens; 1 elsewhere, so that the chain passes through unchanged."""
    return torch.where(keep, factor, 1.0).float()


def _scan_from_end(x_BT: Tensor, decay_BT: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1} with y past the end = 0, by doubling: log2(T) vector steps in place of T."""
    step, length = 1, x_BT.shape[1]
    while step < length:
        x_BT = x_BT + decay_BT * F.pad(x_BT[:, step:], (0, step))
        decay_BT = decay_BT * F.pad(decay_BT[:, step:], (0, step))
        step *= 2
    return x_BT
