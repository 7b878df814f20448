"""The metrics of a rollout, from its tables; docs/rl.md says what each one shows when something is wrong.

Letters as in rollout/tables.py. Only tokens that the model wrote are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mrlhf.config.options import PPOStage
from mrlhf.rl.kl import kl_estimate
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.shaping import EQUAL_TOLERANCE, equal_groups, is_rounding


@dataclass(frozen=True)
class Tables:
    """The inputs of a step's losses. scores_B: shaped, before clipping. advantages_BA: before whitening."""

    scores_B: torch.Tensor
    mask_BA: torch.Tensor
    rollout_BA: torch.Tensor  # vLLM's log-probs
    old_BA: torch.Tensor
    entropy_BA: torch.Tensor
    ref_BA: torch.Tensor | None
    values_BA: torch.Tensor | None
    rewards_BA: torch.Tensor
    advantages_BA: torch.Tensor
    returns_BA: torch.Tensor

    def token_mean(self, x_BA: torch.Tensor) -> float:
        return float((x_BA * self.mask_BA).sum() / self.mask_BA.sum())

    def kl_B(self) -> torch.Tensor:
        """k1 to the reference, summed over each answer."""
        if self.ref_BA is None:
            return torch.zeros(self.mask_BA.size(0))
        return (kl_estimate(self.old_BA, self.ref_BA, kind="k1") * self.mask_BA).sum(-1)


def logprob_mismatch(old_BA: torch.Tensor, rollout_BA: torch.Tensor, mask_BA: torch.Tensor) -> dict[str, float]:
    """The difference between the trainer's log-probs and those that vLLM sampled with."""
    gap_BA, tokens = (old_BA - rollout_BA) * mask_BA, mask_BA.sum()
    return {
        "rollout/logprob_abs_diff_mean": float(gap_BA.abs().sum() / tokens),
        "rollout/logprob_abs_diff_max": float(gap_BA.abs().max()),
        # KL(vLLM || trainer) from vLLM's samples, by k3
        "rollout/kl_mismatch": float((torch.expm1(gap_BA) - gap_BA).sum() / tokens),
    }


def answers_as_text(
    rollout: Rollout, tables: Tables, decode: Callable[[list[int]], str], *, most: int
) -> list[dict[str, Any]]:
    """The first `most` answers with prompt, score and KL, for people to read."""
    kl_B, answers = tables.kl_B(), rollout.answers
    return [{"prompt": decode(rollout.prompts[b]), "completion": decode(answers[b].tokens),
             "score": float(tables.scores_B[b]), "kl": float(kl_B[b]), "label": rollout.labels[b],
             "stopped": answers[b].stopped} for b in range(min(most, rollout.size))]


def score_metrics(
    scores_B: torch.Tensor, *, clip: float, group_size: int, tolerance: float = EQUAL_TOLERANCE
) -> dict[str, float]:
    """Of the scores, of the scores clipped to +-clip, and of the groups that are equal then (from 2 answers on)."""
    scores_B, clipped_B = scores_B.double(), scores_B.double().clamp(-clip, clip)
    metrics = {
        "critic/score/mean": float(scores_B.mean()),
        "critic/score/std": float(scores_B.std(unbiased=False)),
        "critic/score/min": float(scores_B.min()),
        "critic/score/max": float(scores_B.max()),
        "critic/score/clipped_mean": float(clipped_B.mean()),
        "critic/score/clip_ratio": float((scores_B.abs() > clip).double().mean()),
    }
    if group_size > 1:
        equal_G = equal_groups(clipped_B, group_size=group_size, tolerance=tolerance).double()
        metrics["rollout/groups_equal"] = float(equal_G.sum())
        metrics["rollout/groups_equal_share"] = float(equal_G.mean())
    return metrics


def rollout_metrics(
    rollout: Rollout, tables: Tables, config: PPOStage, *, beta: float, gen_seconds: float
) -> dict[str, float]:
    """`score_metrics`, and means over the rollout's answers or tokens. beta: KL coefficient. gen_seconds: time of the
    generation.
    """
    t, lengths_B, reward = tables, rollout.lengths_B().float(), config.reward
    metrics = {
        **score_metrics(t.scores_B, clip=reward.clip, group_size=config.rollout.n, tolerance=reward.equal_tolerance),
        "critic/rewards/mean": float(t.rewards_BA.sum(-1).mean()),
        "critic/advantages/mean": t.token_mean(t.advantages_BA),
        "critic/returns/mean": t.token_mean(t.returns_BA),
        "objective/kl": float(t.kl_B().mean()),
        "kl/coef": beta,
        "response_length/mean": float(lengths_B.mean()),
        "response_length/max": float(lengths_B.max()),
        "response_length/clip_ratio": sum(not a.stopped for a in rollout.answers) / rollout.size,
        "prompt_length/mean": sum(map(len, rollout.prompts)) / rollout.size,
        "rollout/num_answers": float(rollout.size),
        "rollout/tokens_per_s": float(lengths_B.sum()) / gen_seconds,
        "actor/entropy": t.token_mean(t.entropy_BA),
        **logprob_mismatch(t.old_BA, t.rollout_BA, t.mask_BA),
    }
    if config.rollout.environment is not None:
        observed_tokens = sum(stop - start for a in rollout.answers for start, stop in a.observed)
        metrics["environment/turns/mean"] = sum(a.turns for a in rollout.answers) / rollout.size
        metrics["environment/observed_tokens/mean"] = observed_tokens / rollout.size
    if t.values_BA is not None:
        residual_BA, mean_return = t.returns_BA - t.values_BA, t.token_mean(t.returns_BA)
        variance = t.token_mean((t.returns_BA - mean_return) ** 2)
        unexplained = t.token_mean((residual_BA - t.token_mean(residual_BA)) ** 2)
        metrics["critic/values/mean"] = t.token_mean(t.values_BA)
        constant = is_rounding(torch.tensor(variance**0.5), torch.tensor(mean_return))
        metrics["critic/vf_explained_var"] = 0.0 if constant else 1 - unexplained / max(variance, 1e-8)
    return metrics
