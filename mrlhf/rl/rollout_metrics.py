"""The metrics of a rollout, from its tables; docs/rl.md says what each one looks like when it goes wrong.

Legend as in rollout.py; tokens are those that the model wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mrlhf.rl.kl import kl_estimate
from mrlhf.rl.rollout.tables import Rollout


@dataclass(frozen=True)
class Tables:
    """What a step computes on. scores_B: shaped (overlong penalty, scaling), before clipping; advantages_BA before whitening."""

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

    def mean(self, x_BA: torch.Tensor) -> float:
        return float((x_BA * self.mask_BA).sum() / self.mask_BA.sum())

    def kl_B(self) -> torch.Tensor:
        """k1 to the reference, summed over each answer."""
        if self.ref_BA is None:
            return torch.zeros(self.mask_BA.size(0))
        return (kl_estimate(self.old_BA, self.ref_BA, kind="k1") * self.mask_BA).sum(-1)


def mismatch(old_BA: torch.Tensor, rollout_BA: torch.Tensor, mask_BA: torch.Tensor) -> dict[str, float]:
    """What lies between the trainer's log-probs and those vLLM sampled by."""
    gap_BA, tokens = (old_BA - rollout_BA) * mask_BA, mask_BA.sum()
    return {
        "rollout/logprob_abs_diff_mean": float(gap_BA.abs().sum() / tokens),
        "rollout/logprob_abs_diff_max": float(gap_BA.abs().max()),
        # KL(vLLM || trainer) from vLLM's samples, by k3
        "rollout/kl_mismatch": float((torch.expm1(gap_BA) - gap_BA).sum() / tokens),
    }


def mismatch_warning(found: dict[str, float], *, limit: float, corrected: bool) -> str | None:
    """A line for the log where vLLM samples by another policy than the trainer's."""
    kl = found["rollout/kl_mismatch"]
    if kl <= limit:
        return None
    stale = found.get("rollout/staleness", 0.0)
    age = f" (its weights are {stale:g} update(s) older, which is a part of it)" if stale else ""
    treated = (
        "rollout.correction weighs the loss, but this much means a cause"
        if corrected
        else "the loss is not corrected for it (rollout.correction none)"
    )
    return (
        f"WARNING: vLLM samples by another policy than the trainer's{age}: rollout/kl_mismatch {kl:.3g} > {limit:g} nats a token, "
        f"|log-prob difference| {found['rollout/logprob_abs_diff_mean']:.3g} mean, {found['rollout/logprob_abs_diff_max']:.3g} max; {treated}. "
        "Look at: weights not brought over, top_p/top_k on, another dtype or kernel (rollout.mismatch_warning sets the limit)"
    )


def describe(rollout: Rollout, tables: Tables, *, beta: float, gen_seconds: float, with_environment: bool) -> dict[str, float]:
    """Means of the rollout."""
    t, lengths_B = tables, rollout.lengths_B().float()
    found = {
        "critic/score/mean": float(t.scores_B.mean()),
        "critic/rewards/mean": float(t.rewards_BA.sum(-1).mean()),
        "critic/advantages/mean": t.mean(t.advantages_BA),
        "critic/returns/mean": t.mean(t.returns_BA),
        "objective/kl": float(t.kl_B().mean()),
        "kl/coef": beta,
        "response_length/mean": float(lengths_B.mean()),
        "response_length/max": float(lengths_B.max()),
        "response_length/clip_ratio": sum(not a.stopped for a in rollout.answers) / rollout.size,
        "prompt_length/mean": sum(map(len, rollout.prompts)) / rollout.size,
        "rollout/num_answers": float(rollout.size),
        "rollout/tokens_per_s": float(lengths_B.sum()) / gen_seconds,
        "actor/entropy": t.mean(t.entropy_BA),
        **mismatch(t.old_BA, t.rollout_BA, t.mask_BA),
    }
    if with_environment:
        found["environment/turns/mean"] = sum(a.turns for a in rollout.answers) / rollout.size
        found["environment/observed_tokens/mean"] = sum(stop - start for a in rollout.answers for start, stop in a.observed) / rollout.size
    if t.values_BA is not None:
        residual_BA, centre = t.returns_BA - t.values_BA, t.mean(t.returns_BA)
        spread_of_returns = t.mean((t.returns_BA - centre) ** 2)
        found["critic/values/mean"] = t.mean(t.values_BA)
        found["critic/vf_explained_var"] = 1 - t.mean((residual_BA - t.mean(residual_BA)) ** 2) / max(spread_of_returns, 1e-8)
    return found
