"""The clipped policy and value losses of PPO and its relatives.

Letters: B answers (or packed rows), T tokens. Masks are 1 on answer tokens. Everything is fp32; log-probs are in nats.
Loss = sum / denominator and metrics = [sum, count], as in `mrlhf.losses`. The caller adds entropy bonus, KL in the loss
and ptx.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrlhf.errors import ConfigError
from mrlhf.losses import check_choice, check_same_shape, fill_masked, reduce_loss, sequence_means, sum_and_count

LOG_RATIO_LIMIT = 20.0
FAR_LOG_RATIO = math.log(2.0)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float,
                clip_high: float, dual_clip: float | None = None, ratio: str = "token", aggregation: str = "token",
                denominator: Tensor | float | None = None, rollout_logps: Tensor | None = None,
                correction: tuple[str, float, float] | None = None, segment_ids: Tensor | None = None,
                num_segments: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (PPO, Schulman 2017, eq. 7). Tensors are [B, T].

    Gradients flow into logps only.
    ratio: "token" exp(clamp(logp - old_logp, +-20)); "sequence" exp of the mean of logp - old_logp over the answer,
        where each token's gradient is weighted by its own advantage (GSPO-token, Zheng 2025, eq. 14; equal to eq. 5
        where A is constant over an answer).
    dual_clip c > 1: where A < 0 the loss is at most -c A (Ye 2020, eq. 5).
    aggregation, denominator, segment_ids, num_segments: see `mrlhf.losses.reduce_loss`; segments also bound the
        sequence ratio.
    correction: ("tis", lo, hi) weights each token's loss by w = exp(old_logp - rollout_logp) truncated to [lo, hi];
        ("icepop", lo, hi) by w inside [lo, hi] and 0 outside. w carries no gradient; dropped tokens stay in the
        denominator.

    Returns (loss, metrics): pg_loss (by the aggregation), pg_clipfrac (share of tokens where clipping raised the loss),
    ppo_kl (mean of old_logp - logp), ratio_mean and, from each token's own ratio, ratio_mean_dev (mean of
    min(|ratio - 1|, 1)) and ratio_far (share of tokens beyond a factor of 2) as [sum, count]; ratio_max_dev =
    [max |ratio - 1|, 1], reduced by max.
    Raises ConfigError for options out of range, ValueError if shapes differ.
    """
    check_choice("ratio", ratio, ("token", "sequence"))
    if not (clip_low >= 0 and clip_high >= 0):
        raise ConfigError(f"clip_low = {clip_low}, clip_high = {clip_high}", expected="two numbers >= 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip = {dual_clip}", expected="a number > 1 (usually 3), or null")
    check_same_shape(logps=logps, old_logps=old_logps, advantages=advantages, mask=mask, rollout_logps=rollout_logps)
    keep, segments = mask.bool(), {"segment_ids": segment_ids, "num_segments": num_segments}
    logps_BT, advantages_BT = fill_masked(logps, keep), fill_masked(advantages.detach(), keep)
    old_BT = fill_masked(old_logps.detach(), keep)
    log_ratio_BT = token_log_ratio_BT = logps_BT - old_BT
    if ratio == "sequence":
        mean_S, _ = sequence_means(token_log_ratio_BT.detach(), mask, **segments)
        if segment_ids is None:
            mean_BT = mean_S[:, None].expand_as(logps_BT)
        else:
            mean_BT = mean_S[segment_ids.masked_fill(~keep, 0)]
        # the subtraction is 0 in value and d logp in gradient
        log_ratio_BT = mean_BT + (logps_BT - logps_BT.detach())
    ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    objective_BT = torch.minimum(unclipped_BT, clipped_BT)
    if dual_clip is not None:
        floor_BT = torch.maximum(objective_BT, dual_clip * advantages_BT)
        objective_BT = torch.where(advantages_BT < 0, floor_BT, objective_BT)
    if correction is not None:
        objective_BT = objective_BT * _correction_weight(old_BT, rollout_logps, keep, correction)
    loss, pg_loss = reduce_loss(-objective_BT, mask, aggregation=aggregation, denominator=denominator, **segments)

    deviation = fill_masked((ratio_BT.detach() - 1).abs(), keep).amax()
    # one token of a ratio of 100 says less about all of them than a hundred tokens of a ratio of 2
    own_deviation_BT = torch.expm1(token_log_ratio_BT.detach().clamp(max=FAR_LOG_RATIO)).abs()
    metrics = {
        "pg_loss": pg_loss,
        "pg_clipfrac": sum_and_count(clipped_BT < unclipped_BT, keep),
        "ppo_kl": sum_and_count(-token_log_ratio_BT, keep),
        "ratio_mean": sum_and_count(ratio_BT, keep),
        "ratio_mean_dev": sum_and_count(own_deviation_BT, keep),
        "ratio_far": sum_and_count(token_log_ratio_BT.abs() > FAR_LOG_RATIO, keep),
        "ratio_max_dev": torch.stack([deviation, torch.ones_like(deviation)]),
    }
    return loss, metrics


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = None,
               denominator: Tensor | float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 max((V - R)^2, (V_clipped - R)^2) with V_clipped = old + clip(V - old, +-clip); clip=None: 0.5 (V - R)^2.

    All tensors are [B, T]. The clipping of OpenAI's PPO ("The 37 Implementation Details of PPO", Huang 2022, detail 9).
    Only values gets gradients.
    denominator: answer tokens of the whole optimizer step; None: of this call.
    Returns (loss, metrics): vf_loss and vf_clipfrac (share of tokens where clipping raised the loss) as [sum, count].
    Raises ConfigError if clip <= 0, ValueError if shapes differ.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"value clip = {clip}", expected="a number > 0, or null for no clipping")
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    keep = mask.bool()
    values_BT, returns_BT = fill_masked(values, keep), fill_masked(returns.detach(), keep)
    clipped_BT = unclipped_BT = (values_BT - returns_BT).square()
    if clip is not None:
        # in fp32 old + clip(V - old) differs from V inside the range too, and vf_clipfrac would count rounding
        old_BT = fill_masked(old_values.detach(), keep)
        clipped_BT = (values_BT.clamp(old_BT - clip, old_BT + clip) - returns_BT).square()
    loss, vf_loss = reduce_loss(0.5 * torch.maximum(unclipped_BT, clipped_BT), mask, denominator=denominator)
    return loss, {"vf_loss": vf_loss, "vf_clipfrac": sum_and_count(clipped_BT > unclipped_BT, keep)}


def _correction_weight(
    old_BT: Tensor, rollout_logps: Tensor | None, keep: Tensor, correction: tuple[str, float, float]
) -> Tensor:
    """[B, T], see `policy_loss`. tis: truncated importance sampling (Yao 2025); icepop: Ling Team 2025."""
    kind, low, high = correction
    check_choice("correction", kind, ("tis", "icepop"))
    if not (0 <= low <= high and math.isfinite(low)):
        raise ConfigError(f"correction range [{low}, {high}]", expected="0 <= lo <= hi")
    if rollout_logps is None:
        what = f"correction {kind!r} needs the log-probs of the rollout engine"
        raise ConfigError(what, fix="record them, or switch the correction off")
    log_weight_BT = old_BT - fill_masked(rollout_logps.detach(), keep)
    weight_BT = log_weight_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind == "tis":
        return weight_BT.clamp(low, high)
    return torch.where((weight_BT >= low) & (weight_BT <= high), weight_BT, 0.0)
