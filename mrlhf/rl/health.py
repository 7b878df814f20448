"""What a PPO run says when a step cannot be right or cannot teach: the first ratio, and the signal in the scores.

Letters as in rollout/tables.py. Metrics are equal on all ranks of a data-parallel group; tensor-parallel ranks may
differ in the last bit, so a decision is the maximum over all ranks.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch

from mrlhf.config.options import PPOStage
from mrlhf.errors import NotFinite
from mrlhf.parallel import state
from mrlhf.rl.shaping import equal_groups

log = logging.getLogger(__name__)
Metrics = dict[str, float]
# The policy is the same in both passes: |ratio - 1| is what arithmetic in another order makes of it. Measured on dense
# and MoE models with logits up to 33: mean 1e-6 in float32, 0.007 in bfloat16, where single tokens reach 0.6 because
# another expert was chosen. A temperature that is 10 % off gives a mean of 0.02 to 0.15, a mask shifted by one 0.5.
RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
_LARGEST_OF_A_TOKEN = {"float32": 1e-4, "bfloat16": 0.25}  # beyond it a warning
_FAR_SHARE, _FAR_TOKENS = 0.01, 3
_TRUNCATED_SHARE, _CLIPPED_SHARE = 0.9, 0.5


class Health:
    """The warnings of a run on rank 0, a kind at its 1st, 10th, 100th, ... time; and the guard on the first ratio."""

    def __init__(self, config: PPOStage) -> None:
        self.config, self.counts = config, Counter[str]()

    def warn(self, step: int, kind: str, text: str) -> None:
        self.counts[kind] += 1
        count = self.counts[kind]
        if count == 10 ** (len(str(count)) - 1) and state.is_main():
            log.warning(f"step {step}: {text}" + (f" (so far at {count} steps)" if count > 1 else ""))

    def first_ratio(self, step: int, update: Metrics, *, tokens: int) -> None:
        """Judges the first update of a rollout, of so many tokens. Collective.

        Raises NotFinite on all ranks if the ratios are not 1 on average (`ppo.ratio_tolerance`), or too many
        of them are beyond a factor of 2; warns where they are near that.
        """
        dtype = self.config.model.dtype
        tolerance = self.config.ppo.ratio_tolerance or RATIO_TOLERANCE[dtype]
        mean, far, largest = (update[f"ratio_{name}"] for name in ("mean_dev", "far", "max_dev"))
        far_limit = min(1.0, max(_FAR_SHARE, tolerance / 5, _FAR_TOKENS / tokens))
        what = (f"at the first update of the rollout |ratio - 1| is {mean:.2g} on average (limit {tolerance:g}), "
                f"{largest:.2g} at most, and {far:.2%} of the tokens are beyond a factor of 2 (limit {far_limit:.2%})")
        if state.on_any_rank(not (mean <= tolerance and far <= far_limit)):
            what += ": the training pass and the pass for the old log-probs disagree by more than rounding"
            fix = f"--model.dtype float32 in another --train.output_dir. If it goes on there: --ppo.ratio_tolerance " \
                  f"{2 * mean:.2g} here" if dtype == "bfloat16" else "none in the configuration: please report it"
            raise NotFinite(what, where=f"step {step}", expected="ratios of 1: the policy is the same", fix=fix)
        if state.on_any_rank(mean > tolerance / 5 or largest > _LARGEST_OF_A_TOKEN[dtype]):
            self.warn(step, "ratio", f"{what}. The two passes see the tokens in other micro-batches: in {dtype} that "
                      "moves log-probs, most of all where a MoE router then chooses another expert. The run goes on")

    def rollout(self, step: int, scores_B: torch.Tensor, metrics: Metrics) -> None:
        """Warns of a rollout that teaches little or nothing, or is of another policy. scores_B: shaped, not clipped."""
        config = self.config.rollout
        mismatch = mismatch_warning(metrics, limit=config.mismatch_warning, corrected=config.correction != "none")
        if mismatch is not None and state.is_main():
            log.warning(f"step {step}: {mismatch}")
        self._scores(step, scores_B, metrics)
        truncated = metrics["response_length/clip_ratio"]
        if truncated >= _TRUNCATED_SHARE:
            self.warn(step, "truncated", f"{truncated:.0%} of the answers were cut off at rollout.max_new_tokens = "
                      f"{config.max_new_tokens}, so they do not train an end. Allow longer answers, or check that the "
                      "model writes its end-of-turn token (rollout.stop, rollout.stop_token_ids)")

    def _scores(self, step: int, scores_B: torch.Tensor, metrics: Metrics) -> None:
        reward, config, ppo = self.config.reward, self.config.rollout, self.config.ppo
        span = f"score {metrics['critic/score/min']:.4g} to {metrics['critic/score/max']:.4g}"
        size = config.n if ppo.estimator_row.needs_groups else len(scores_B)
        clipped_B = scores_B.clamp(-reward.clip, reward.clip)
        clipped = metrics["critic/score/clip_ratio"]
        if size > 1 and bool(equal_groups(clipped_B, group_size=size, tolerance=reward.equal_tolerance).all()):
            whose = "the answers to each prompt have equal scores" if size == config.n else "all scores are equal"
            drawn = metrics.get("rollout/prompts_drawn")
            refilled = f", although rollout.dynamic_sampling drew {drawn:.0f} prompts" if drawn else ""
            self.warn(step, "signal", f"{whose}{refilled} ({span}): ppo.estimator {ppo.estimator} learns nothing from "
                      "them. Does the reward tell answers apart? Are the prompts too easy or too hard? Scores that "
                      "differ by no more than reward.equal_tolerance are equal; reward.weights can make them larger")
        elif config.dynamic_sampling and metrics["rollout/groups_equal"]:
            self.warn(step, "refills", f"the answers to {metrics['rollout/groups_equal']:.0f} of {config.batch_size} "
                      f"prompts have equal scores after {config.max_refills} refills (rollout.max_refills)")
        if clipped >= _CLIPPED_SHARE:
            self.warn(step, "clip", f"reward.clip cut {clipped:.0%} of the scores to +-{reward.clip:g} ({span}): it "
                      "hides their differences. Scale the scores (reward.weights, reward.scaling) or raise reward.clip")


def mismatch_warning(metrics: dict[str, float], *, limit: float, corrected: bool) -> str | None:
    """A warning where vLLM's policy differs from the trainer's by more than `limit` nats a token."""
    kl = metrics["rollout/kl_mismatch"]
    if kl <= limit:
        return None
    stale = metrics.get("rollout/staleness", 0.0)
    age = f" (its weights are {stale:g} update(s) older, which explains a part)" if stale else ""
    treatment = (
        "rollout.correction weights the loss, but a difference this large has a cause"
        if corrected
        else "the loss is not corrected for it (rollout.correction none)"
    )
    return (
        f"vLLM samples from another policy than the trainer's{age}: rollout/kl_mismatch {kl:.3g} > {limit:g} "
        f"nats a token, |log-prob difference| {metrics['rollout/logprob_abs_diff_mean']:.3g} mean, "
        f"{metrics['rollout/logprob_abs_diff_max']:.3g} max; {treatment}. Possible causes: weights not updated, "
        "top_p/top_k on, another dtype or kernel (rollout.mismatch_warning sets the limit)"
    )


def truncation_notes(config: PPOStage) -> list[str]:
    """Lines for the start of a run: what samples from another distribution than the trainer's."""
    rollout = config.rollout
    on = [f"rollout.{name} = {getattr(rollout, name)}" for name, off in (("top_p", 1.0), ("top_k", -1))
          if getattr(rollout, name) != off]
    if not on:
        return []
    treatment = ("the loss is not corrected for it" if rollout.correction == "none"
                 else f"rollout.correction {rollout.correction} weights the loss by the difference")
    return [f"note: {' and '.join(on)}: vLLM samples from a truncated distribution, and the trainer's log-probs are of "
            f"the whole one. This biases the ratio and shows as rollout/kl_mismatch; {treatment}"]
