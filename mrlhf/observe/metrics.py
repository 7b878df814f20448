"""Every metric: name, meaning, unit, and how micro-batches and ranks are reduced.

Partial sums are float tensors [2] = [sum, count] (max and min: [value, 1]; a count of 0 means "no value"). Inside the
math names may be bare (`pg_loss`, `rewards/chosen`); the stage adds the prefix. `all_reduce` costs at most two small
collectives a step, whatever the number of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "exp_mean", "max", "min", "sum", "last"]


@dataclass(frozen=True)
class Metric:
    """`mean`, `sum`, `max`, `min` run over micro-batches and ranks; `exp_mean` is exp of the mean; `last` is the same
    on all ranks and not reduced."""

    meaning: str
    unit: str
    reduction: Reduction


METRICS: dict[str, Metric] = {
    # every stage
    "train/loss": Metric("the loss that was minimised (ppo: none; see actor/ and critic/)", "nats", "mean"),
    "train/grad_norm": Metric("global gradient norm before clipping", "", "last"),
    "train/lr": Metric("learning rate of this step", "", "last"),
    "train/num_tokens": Metric("tokens of this step that carry loss", "tokens", "sum"),
    "train/num_rows": Metric("rows of this step: packs, samples or pairs", "rows", "sum"),
    "train/samples": Metric("samples (pairs, answers) trained on so far", "samples", "last"),
    "train/epoch": Metric("passes over the training data so far", "epochs", "last"),
    "train/loss_spike": Metric("1 if the loss lies far above those of the last 50 steps "
        "(train.loss_spike_threshold)", "", "last"),
    "train/skipped": Metric("1 if the step was left out, its loss or gradient not finite (train.on_nonfinite "
        "skip)", "", "last"),
    "train/moe_aux_loss": Metric("load-balancing loss before its weight, mean over tokens and layers with "
        "experts; 1: balanced", "", "last"),
    "train/moe_z_loss": Metric("log(sum of exp(router's logits))^2, mean over tokens and layers with "
        "experts", "", "last"),
    "perf/tokens_per_s_per_gpu": Metric("tokens read in a second by one rank, padding not counted", "tokens/s", "last"),
    "perf/tflops": Metric("model floating-point operations a second and rank", "TFLOP/s", "last"),
    "perf/mfu": Metric("perf/tflops as a share of the device's peak", "share", "last"),
    "time/step_s": Metric("wall time of the step", "s", "last"),
    "time/data_s": Metric("part of the step spent waiting for data", "s", "last"),
    "time/save_s": Metric("what saves have held up the run since the step before", "s", "last"),
    "memory/max_reserved_gib": Metric("largest device memory reserved on any rank so far", "GiB", "max"),
    "memory/device_gib": Metric("CUDA: most memory of the card in use in the step, by whatever library (at the ends of "
        "phases and before vLLM sleeps)", "GiB", "max"),
    # sft, pretrain
    "train/mean_token_accuracy": Metric("trained tokens whose most probable prediction is right", "share", "mean"),
    "train/perplexity": Metric("exp of the mean of -log p over trained tokens", "", "exp_mean"),
    "train/entropy": Metric("entropy of the prediction, over trained tokens", "nats", "mean"),
    "train/log_z_squared": Metric("log(sum of exp(logits))^2 over trained tokens (with loss.z_loss)", "", "mean"),
    # rm
    "train/accuracy": Metric("pairs whose chosen answer scores higher, by more than rounding", "share", "mean"),
    "train/margin": Metric("score of the chosen minus the rejected answer", "score", "mean"),
    "train/mean_reward": Metric("score over all answers", "score", "mean"),
    "train/min_reward": Metric("lowest score", "score", "min"),
    "train/max_reward": Metric("highest score", "score", "max"),
    # dpo
    "train/rewards/chosen": Metric("beta x (policy - reference log-prob) of the chosen answer", "score", "mean"),
    "train/rewards/rejected": Metric("the same for the rejected answer", "score", "mean"),
    "train/rewards/margins": Metric("rewards/chosen - rewards/rejected", "score", "mean"),
    "train/rewards/accuracies": Metric("pairs with a margin above 0 and its rounding", "share", "mean"),
    "train/logps/chosen": Metric("log-prob of the chosen answer (summed over its tokens)", "nats", "mean"),
    "train/logps/rejected": Metric("log-prob of the rejected answer (summed over its tokens)", "nats", "mean"),
    # ppo
    "train/score/mean": Metric("(eval) score of greedy answers to the evaluation prompts", "score", "mean"),
    "train/response_length/mean": Metric("(eval) length of those answers", "tokens", "mean"),
    "actor/pg_loss": Metric("clipped policy loss", "", "mean"),
    "actor/pg_clipfrac": Metric("answer tokens at which the clip held", "share", "mean"),
    "actor/ppo_kl": Metric("KL from the policy that sampled, estimated by old - new log-prob", "nats", "mean"),
    "actor/entropy": Metric("entropy of the tempered policy over answer tokens", "nats", "mean"),
    "actor/ratio_mean": Metric("probability ratio new / old", "", "mean"),
    "actor/ratio_max_dev": Metric("largest |ratio - 1|; 0 at the first update of a rollout", "", "max"),
    "actor/ratio_mean_dev": Metric("mean of |ratio - 1|, at most 1 a token, at the first update of a rollout", "",
        "mean"),
    "actor/ratio_far": Metric("tokens whose ratio is beyond a factor of 2, at the first update of a rollout", "share",
        "mean"),
    "actor/ptx_loss": Metric("negative log-likelihood of the mixed-in pretraining data (with "
        "ptx.coef)", "nats", "mean"),
    "actor/grad_norm": Metric("the actor's gradient norm before clipping", "", "last"),
    "actor/moe_aux_loss": Metric("as train/moe_aux_loss, of the actor", "", "last"),
    "actor/moe_z_loss": Metric("as train/moe_z_loss, of the actor", "", "last"),
    "actor/lr": Metric("the actor's learning rate", "", "last"),
    "critic/vf_loss": Metric("value loss", "", "mean"),
    "critic/vf_clipfrac": Metric("answer tokens at which the value clip held", "share", "mean"),
    "critic/vf_explained_var": Metric("1 - Var(returns - values) / Var(returns)", "share", "last"),
    "critic/grad_norm": Metric("the critic's gradient norm before clipping", "", "last"),
    "critic/moe_aux_loss": Metric("as train/moe_aux_loss, of the critic", "", "last"),
    "critic/moe_z_loss": Metric("as train/moe_z_loss, of the critic", "", "last"),
    "critic/lr": Metric("the critic's learning rate", "", "last"),
    "critic/score/mean": Metric("sequence score before the KL penalty and reward.clip", "score", "mean"),
    "critic/score/std": Metric("its (biased) standard deviation over the answers; 0: nothing to learn from", "score",
        "mean"),
    "critic/score/min": Metric("lowest sequence score", "score", "min"),
    "critic/score/max": Metric("highest sequence score", "score", "max"),
    "critic/score/clipped_mean": Metric("the sequence score that is trained on, clipped to +-reward.clip", "score",
        "mean"),
    "critic/score/clip_ratio": Metric("answers whose score reward.clip cut", "share", "mean"),
    "critic/rewards/mean": Metric("sum of an answer's token rewards, KL penalty included", "score", "mean"),
    "critic/advantages/mean": Metric("advantage of answer tokens before whitening", "score", "mean"),
    "critic/returns/mean": Metric("return of answer tokens", "score", "mean"),
    "critic/values/mean": Metric("value of answer tokens", "score", "mean"),
    "objective/kl": Metric("KL of an answer to the reference, summed over its tokens", "nats", "mean"),
    "kl/coef": Metric("KL coefficient in force", "", "last"),
    "response_length/mean": Metric("answer length", "tokens", "mean"),
    "response_length/max": Metric("longest answer", "tokens", "max"),
    "response_length/clip_ratio": Metric("answers cut off at rollout.max_new_tokens", "share", "mean"),
    "prompt_length/mean": Metric("prompt length", "tokens", "mean"),
    "rollout/num_answers": Metric("answers of this rollout", "answers", "sum"),
    "rollout/logprob_abs_diff_mean": Metric("|trainer - vLLM log-prob| of sampled tokens", "nats", "mean"),
    "rollout/logprob_abs_diff_max": Metric("its largest value", "nats", "max"),
    "rollout/kl_mismatch": Metric("KL of vLLM's to the trainer's distribution, estimated on sampled "
        "tokens", "nats", "mean"),
    "rollout/staleness": Metric("separate placement: updates between the weights that sampled and the "
        "trainer's", "updates", "last"),
    "rollout/tokens_per_s": Metric("answer tokens generated in a second by all ranks", "tokens/s", "last"),
    "rollout/prompts_drawn": Metric("prompts answered for this rollout, refills included (with "
        "rollout.dynamic_sampling)", "prompts", "last"),
    "rollout/groups_dropped": Metric("of these, those whose answers scored all the same and were "
        "replaced", "prompts", "last"),
    "rollout/groups_equal": Metric("prompts of the rollout whose answers have equal scores "
        "(reward.equal_tolerance), from 2 answers a prompt on", "prompts", "last"),
    "rollout/groups_equal_share": Metric("the same, as a share", "share", "last"),
    "environment/turns/mean": Metric("turns of the model in a conversation", "turns", "mean"),
    "environment/observed_tokens/mean": Metric("tokens that the environment put into a conversation", "tokens", "mean"),
    "timing_s/generators": Metric("separate placement: what the generation took on its ranks; timing_s/gen: "
        "what the trainer waited for it", "s", "last"),
    "timing_s/gen": Metric("generation", "s", "last"),
    "timing_s/reward": Metric("rewards", "s", "last"),
    "timing_s/logprobs": Metric("log-probs under actor and reference", "s", "last"),
    "timing_s/values": Metric("values", "s", "last"),
    "timing_s/adv": Metric("advantages", "s", "last"),
    "timing_s/update_actor": Metric("actor update", "s", "last"),
    "timing_s/update_critic": Metric("critic update", "s", "last"),
    "timing_s/reshard": Metric("new weights into vLLM", "s", "last"),
    "timing_s/step": Metric("whole rollout step", "s", "last"),
    "reshard/bytes": Metric("bytes received by the rank that received most", "bytes", "max"),
    "reshard/seconds": Metric("slowest rank's exchange", "s", "max"),
}

PATTERNS: list[tuple[str, Metric]] = [
    ("memory/*_gib", Metric("largest memory during a phase, of the fullest rank: tensors on the device, vLLM's "
        "while it is awake included; on CPU resident memory", "GiB", "max")),
    ("reward/*", Metric("score of one reward source before its weight", "score", "mean")),
    ("reward_std/*", Metric("standard deviation of that score", "score", "mean")),
    ("train/accuracy_by_margin/*", Metric("(eval) accuracy of the pairs whose scores differ by so much", "share",
        "mean")),
    ("data/*/epoch", Metric("passes over one source of a blend so far", "epochs", "last")),
]


# The metrics of a stage's evaluation under all options: checkpoint.best_metric may name one of these.
_LANGUAGE_MODEL = ("loss", "mean_token_accuracy", "perplexity", "entropy", "num_tokens")
EVALUATED: dict[str, tuple[str, ...]] = {
    "pretrain": _LANGUAGE_MODEL,
    "sft": _LANGUAGE_MODEL,
    "rm": ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"),
    "dpo": (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected",
    ),
}


def find_metric(key: str) -> Metric | None:
    """The entry of a full metric name in the tables above, or None; `eval/x` is `train/x`."""
    name = "train/" + key.removeprefix("eval/") if key.startswith("eval/") else key
    return METRICS.get(name) or next((metric for pattern, metric in PATTERNS if fnmatch(name, pattern)), None)


def _by_suffix() -> dict[str, Reduction]:
    """The reduction of each end of a name (`ratio_max_dev`, `actor/ratio_max_dev`), where all its metrics agree."""
    kinds_of: dict[str, set[Reduction]] = {}
    for name, metric in METRICS.items():
        parts = name.split("/")
        for start in range(len(parts)):
            kinds_of.setdefault("/".join(parts[start:]), set()).add(metric.reduction)
    return {suffix: next(iter(kinds)) for suffix, kinds in kinds_of.items() if len(kinds) == 1}


_REDUCTIONS = _by_suffix()


def reduction(name: str) -> Reduction:
    """How a metric is reduced: as its full name says, else the longest known end of the name, else mean."""
    metric = find_metric(name)
    if metric is not None:
        return metric.reduction
    parts = name.split("/")
    return next((_REDUCTIONS[s] for s in ("/".join(parts[i:]) for i in range(len(parts))) if s in _REDUCTIONS), "mean")


def merge(partials: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merges the partial sums of several micro-batches, whose keys may differ."""
    merged: dict[str, Tensor] = {}
    for part in partials:
        for name, value in part.items():
            merged[name] = _join(reduction(name), merged[name], value) if name in merged else value
    return merged


def all_reduce(partials: dict[str, Tensor], group: ProcessGroup | None) -> dict[str, Tensor]:
    """Collective. Reduces the partial sums over the ranks of `group`. Every rank must hold the same keys."""
    import torch
    import torch.distributed as dist

    if not partials or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return dict(partials)
    reduced = dict(partials)
    # float64 counts tokens exactly; the minimum is the negative maximum of the negatives
    adds = [n for n in sorted(partials) if reduction(n) in ("mean", "exp_mean", "sum")]
    if adds:
        stacked = torch.stack([partials[n].double() for n in adds])
        dist.all_reduce(stacked, op=dist.ReduceOp.SUM, group=group)
        reduced.update(zip(adds, stacked.unbind(), strict=True))
    extremes = [n for n in sorted(partials) if reduction(n) in ("max", "min")]
    if extremes:
        signs = {n: -1.0 if reduction(n) == "min" else 1.0 for n in extremes}
        rows = [torch.stack([_or_nothing(partials[n].double(), signs[n]), partials[n][1].double()]) for n in extremes]
        stacked = torch.stack(rows)
        dist.all_reduce(stacked, op=dist.ReduceOp.MAX, group=group)
        for name, row in zip(extremes, stacked.unbind(), strict=True):
            reduced[name] = torch.stack([row[0] * signs[name], row[1]])
    return reduced


def finalize(partials: dict[str, Tensor]) -> dict[str, float]:
    """The values to log, with one transfer from the device; nan for a metric without a value."""
    import torch

    if not partials:
        return {}
    pairs = torch.stack([p.double() for p in partials.values()]).tolist()
    values: dict[str, float] = {}
    for name, (value, count) in zip(partials, pairs, strict=True):
        if count == 0:
            values[name] = math.nan
        else:
            kind = reduction(name)
            mean = value / count
            values[name] = mean if kind == "mean" else math.exp(min(mean, 700.0)) if kind == "exp_mean" else value
    return values


def markdown_table() -> str:
    """The table of all metrics for the docs."""
    lines = ["| key | meaning | unit | over micro-batches and ranks |", "|---|---|---|---|"]
    for name, m in [*METRICS.items(), *PATTERNS]:
        lines.append(f"| `{name}` | {m.meaning.replace('|', chr(92) + '|')} | {m.unit} | {m.reduction} |")
    lines.append("| `eval/*` | as `train/*`, on the evaluation split | | |")
    return "\n".join(lines) + "\n"


def _join(kind: Reduction, a: Tensor, b: Tensor) -> Tensor:
    import torch

    if kind in ("mean", "exp_mean", "sum"):
        return a + b
    if kind == "last":
        return torch.where(b[1] > 0, b, a)
    sign = -1.0 if kind == "min" else 1.0
    value = torch.maximum(_or_nothing(a, sign), _or_nothing(b, sign)) * sign
    return torch.stack([value, torch.maximum(a[1], b[1])])


def _or_nothing(pair: Tensor, sign: float) -> Tensor:
    """The value times sign, or -inf where there is no value, so that it loses every comparison."""
    import torch

    return torch.where(pair[1] > 0, pair[0] * sign, torch.full_like(pair[0], -math.inf))
