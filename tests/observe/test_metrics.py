"""Partial sums: what micro-batches and ranks put together must be what one rank would have computed on everything."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as mp

from mrlhf.observe import metrics
from mrlhf.observe.metrics import METRICS, all_reduce, finalize, find_metric, markdown_table, merge, reduction

NAMED_IN_STYLE = [
    "train/loss", "train/grad_norm", "train/lr", "train/num_tokens", "train/epoch", "perf/tokens_per_s_per_gpu",
    "perf/tflops", "perf/mfu", "time/step_s", "time/data_s", "memory/max_reserved_gib", "train/mean_token_accuracy",
    "train/entropy", "train/accuracy", "train/margin", "train/mean_reward", "train/min_reward", "train/max_reward",
    "train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins", "train/rewards/accuracies",
    "train/logps/chosen", "train/logps/rejected", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl",
    "actor/entropy", "actor/grad_norm", "actor/lr", "critic/vf_loss", "critic/vf_clipfrac",
    "critic/vf_explained_var", "critic/score/mean", "critic/rewards/mean", "critic/advantages/mean",
    "critic/returns/mean", "critic/values/mean", "objective/kl", "response_length/mean", "response_length/max",
    "response_length/clip_ratio", "prompt_length/mean", "rollout/logprob_abs_diff_mean",
    "rollout/logprob_abs_diff_max", "rollout/kl_mismatch", "rollout/tokens_per_s", "timing_s/gen", "timing_s/reward",
    "timing_s/logprobs", "timing_s/values", "timing_s/adv", "timing_s/update_actor", "timing_s/update_critic",
    "timing_s/reshard", "timing_s/step", "reshard/bytes", "reshard/seconds", "train/num_rows", "train/samples",
    "train/skipped", "actor/ratio_mean", "actor/ratio_max_dev", "kl/coef", "rollout/num_answers",
    "reward/model:runs/rm", "reward/r.py:f", "eval/loss", "eval/mean_token_accuracy", "eval/rewards/margins",
    "eval/max_reward",
]  # fmt: skip


def pair(value: float, count: float = 1.0) -> torch.Tensor:
    return torch.tensor([value, count])


def test_every_promised_key_is_in_the_table():
    assert all(find_metric(key) for key in NAMED_IN_STYLE)


@pytest.mark.parametrize("key", ["train/los", "gold/reward", "eval/actor/pg_loss", "loss"])
def test_other_keys_are_refused(key):
    assert find_metric(key) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("loss", "mean"),
        ("ratio_max_dev", "max"),
        ("actor/ratio_max_dev", "max"),
        ("min_reward", "min"),
        ("eval/min_reward", "min"),
        ("max_reward", "max"),
        ("logprob_abs_diff_max", "max"),
        ("rollout/logprob_abs_diff_max", "max"),
        ("response_length/max", "max"),
        ("max", "max"),
        ("num_tokens", "sum"),
        ("rewards/chosen", "mean"),
        ("reward/x.py:f", "mean"),
        ("never_heard_of", "mean"),
        ("lr", "last"),
        ("bytes", "max"),
    ],
)
def test_reduction_is_found_for_full_and_bare_names(name, kind):
    assert reduction(name) == kind


def test_bare_names_are_not_ambiguous():
    """A bare name must mean one reduction; otherwise `reduction` would silently fall back to the mean."""
    assert all(name.rpartition("/")[2] in metrics._REDUCTIONS for name in METRICS)


def test_merge_and_finalize():
    merged = merge(
        [
            {
                "loss": pair(6.0, 3),
                "num_tokens": pair(3),
                "max_reward": pair(-4.0),
                "min_reward": pair(-4.0),
                "lr": pair(0.1),
            },
            {
                "loss": pair(2.0, 1),
                "num_tokens": pair(1),
                "max_reward": pair(-7.0),
                "min_reward": pair(-7.0),
                "lr": pair(0.2),
            },
            {
                "loss": pair(0.0, 0),
                "num_tokens": pair(0),
                "max_reward": pair(0.0, 0),
                "min_reward": pair(0.0, 0),
                "lr": pair(0.0, 0),
            },
        ]
    )
    found = finalize(merged)
    assert found == {"loss": 2.0, "num_tokens": 4.0, "max_reward": -4.0, "min_reward": -7.0, "lr": pytest.approx(0.2)}


def test_nothing_seen_is_nan_and_keys_may_differ():
    found = finalize(merge([{"loss": pair(0.0, 0)}, {"entropy": pair(1.0, 2)}]))
    assert math.isnan(found["loss"]) and found["entropy"] == 0.5
    assert finalize({}) == {} and merge([]) == {}


def test_perplexity_is_exp_of_the_mean_over_all_tokens():
    parts = [{"perplexity": pair(6.0, 3)}, {"perplexity": pair(2.0, 1)}]
    assert finalize(merge(parts)) == {"perplexity": pytest.approx(math.exp(8 / 4))}
    assert finalize({"perplexity": pair(1e9, 1)})["perplexity"] == math.exp(700), "no overflow"


def test_one_rank_reduces_nothing():
    assert finalize(all_reduce({"loss": pair(3.0, 2)}, None)) == {"loss": 1.5}


def _worker(rank: int, file: str, results: mp.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    calls = []
    original = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (calls.append(k["op"]), original(*a, **k))[1]
    names = ["loss", "min_reward", "ratio_max_dev", "num_tokens", "entropy"]
    mine = {
        "loss": pair(rank + 1.0, rank + 1.0),
        "min_reward": pair(-1.0 - rank),
        "ratio_max_dev": pair(5.0 * (1 - rank), 1.0 - rank),
        "num_tokens": pair(2.0**24 - rank),
        "entropy": pair(0.0, 0.0),
    }
    order = names if rank == 0 else names[::-1]
    results.put((rank, finalize(all_reduce({n: mine[n] for n in order}, None)), len(calls)))
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    for _, found, calls in answers:
        assert math.isnan(found.pop("entropy"))
        assert found == {"loss": 1.0, "min_reward": -2.0, "ratio_max_dev": 5.0, "num_tokens": 2.0**25 - 1}
        assert calls == 2


def test_markdown_table_has_a_line_for_each():
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(METRICS) + len(metrics.PATTERNS) + 1
    assert all(line.count("|") - line.count("\\|") == 5 for line in lines)


def test_every_metric_is_explained():
    assert all(m.meaning and find_metric(name) is m for name, m in METRICS.items())
