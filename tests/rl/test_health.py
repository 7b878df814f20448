"""The first ratio: rounding goes on, faults end the run. A rollout that teaches nothing shows in metrics and log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from mrlhf.config.load import load_config
from mrlhf.config.options import PPOStage
from mrlhf.errors import NotFinite
from mrlhf.observe.metrics import finalize
from mrlhf.parallel import state
from mrlhf.rl.estimators import ESTIMATORS
from mrlhf.rl.health import Health
from mrlhf.rl.policy_loss import policy_loss
from mrlhf.rl.rollout_metrics import score_metrics

B, A, VOCAB = 32, 24, 200


def config(**changes: object) -> PPOStage:
    values = {
        "model.path": "m",
        "data.train": "p",
        "train.output_dir": "o",
        "train.global_batch_size": 8,
        "rollout.batch_size": 2,
        "rollout.n": 4,
        "reward.sources": "f.py:f",
        **changes,
    }
    return load_config(PPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "on_any_rank", bool)
    monkeypatch.setattr(state, "is_main", lambda: True)


@pytest.fixture
def policy() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, A, V] of a policy of about 1.6 nats, and tokens that it sampled."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(B, A, VOCAB, generator=generator)
    tokens = torch.multinomial(logits.softmax(-1).view(-1, VOCAB), 1, generator=generator).view(B, A, 1)
    return logits, tokens


def logps(policy: tuple[torch.Tensor, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    logits, tokens = policy
    return (logits / temperature).log_softmax(-1).gather(-1, tokens)[..., 0]


def first_update(new: torch.Tensor, old: torch.Tensor, **options: str) -> dict[str, float]:
    mask = torch.ones(B, A)
    return finalize(policy_loss(new, old, torch.ones(B, A), mask, clip_low=0.2, clip_high=0.2, **options)[1])


def moved(old: torch.Tensor, share: float, by: float) -> torch.Tensor:
    """Log-probs of which a share is another, and all others are off by bf16 rounding."""
    generator = torch.Generator().manual_seed(1)
    other = torch.rand(B, A, generator=generator) < share
    noise = 0.006 * torch.randn(B, A, generator=generator)
    return old + torch.where(other, by, noise)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("share,by", [(0.004, 0.4), (0.005, -2.0), (0.005, 6.0), (0.05, 0.3)])
def test_single_tokens_of_another_expert_go_on_with_a_warning(policy, caplog, ratio, share, by) -> None:
    old = logps(policy)
    update = first_update(moved(old, share, by), old, ratio=ratio)
    if ratio == "token":
        assert update["ratio_max_dev"] > 0.25, "what ended a run before"
    Health(config(**{"model.dtype": "bfloat16"})).first_ratio(1, update, tokens=B * A)
    assert len(caplog.records) == 1 or ratio == "sequence"


def test_rounding_goes_on_without_a_word(policy, caplog) -> None:
    old = logps(policy)
    Health(config(**{"model.dtype": "bfloat16"})).first_ratio(1, first_update(moved(old, 0, 0), old), tokens=B * A)
    exact = first_update(old + 1e-6 * torch.randn(B, A, generator=torch.Generator().manual_seed(2)), old)
    Health(config(**{"model.dtype": "float32"})).first_ratio(1, exact, tokens=B * A)
    assert not caplog.records


def faults(policy) -> dict[str, torch.Tensor]:
    old, other = logps(policy), torch.Generator().manual_seed(3)
    logits, tokens = policy
    weights = logits + torch.randn(logits.shape, generator=other)
    few = old.clone()
    few[:, 0] -= 3.0  # one token of every answer
    return {
        "mask shifted by one": old.roll(1, 1),
        "temperature": logps(policy, 0.8),
        "other weights": logps((weights, tokens)),
        "answers of other rows": old.roll(1, 0),
        "the first token of each answer": few,
        "not a number": old * float("nan"),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_faults_end_the_run(policy, dtype, ratio) -> None:
    old = logps(policy)
    for name, new in faults(policy).items():
        fix = "please report it" if dtype == "float32" else "--ppo.ratio_tolerance"
        with pytest.raises(NotFinite, match=rf"(?s)step 3: .*{fix}"):
            Health(config(**{"model.dtype": dtype})).first_ratio(3, first_update(new, old, ratio=ratio), tokens=B * A)
            pytest.fail(name)
    slightly = first_update(logps(policy, 0.99), old)
    with pytest.raises(NotFinite, match="limit 0.001"):
        Health(config(**{"model.dtype": "float32"})).first_ratio(3, slightly, tokens=B * A)


def test_the_key_sets_the_limit_and_few_tokens_are_no_quantile(policy) -> None:
    old = logps(policy)
    update = first_update(logps(policy, 0.8), old)
    Health(config(**{"model.dtype": "bfloat16", "ppo.ratio_tolerance": 0.9})).first_ratio(1, update, tokens=B * A)
    one_of_forty = {"ratio_mean_dev": 0.02, "ratio_far": 1 / 40, "ratio_max_dev": 5.0}
    Health(config(**{"model.dtype": "bfloat16"})).first_ratio(1, one_of_forty, tokens=40)
    with pytest.raises(NotFinite):
        Health(config(**{"model.dtype": "bfloat16"})).first_ratio(1, one_of_forty, tokens=4000)


def test_a_rank_that_sees_a_fault_ends_all(policy, monkeypatch) -> None:
    monkeypatch.setattr(state, "on_any_rank", lambda flag: True)
    fine = {"ratio_mean_dev": 0.0, "ratio_far": 0.0, "ratio_max_dev": 0.0}
    with pytest.raises(NotFinite):
        Health(config()).first_ratio(1, fine, tokens=100)


QUIET = {"rollout/kl_mismatch": 0.0, "response_length/clip_ratio": 0.0}


def warnings(scores: list[float], caplog: pytest.LogCaptureFixture, steps: int = 1, **changes: object):
    """(metrics, warnings) of a rollout with these scores."""
    caplog.clear()
    given = config(**changes)
    reward, extra = given.reward, dict(QUIET)
    extra |= score_metrics(torch.tensor(scores), clip=reward.clip, group_size=given.rollout.n,
                           tolerance=reward.equal_tolerance)  # fmt: skip
    health = Health(given)
    for step in range(1, steps + 1):
        health.rollout(step, torch.tensor(scores), extra)
    return extra, [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_constant_reward_shows_under_every_estimator(estimator, caplog) -> None:
    for scores in ([1.0] * 8, [0.1] * 4 + [0.1 + 1e-8] * 4, [1e30] * 4 + [2e30] * 4):
        metrics, lines = warnings(scores, caplog, **{"ppo.estimator": estimator})
        assert "learns nothing" in lines[0] and metrics["rollout/groups_equal_share"] == 1
    assert len(lines) == 2 and "reward.clip cut 100% of the scores to +-10" in lines[1]
    assert (metrics["critic/score/clip_ratio"], metrics["critic/score/clipped_mean"]) == (1, 10)
    metrics, lines = warnings([1.0, 2.0] * 4, caplog, **{"ppo.estimator": estimator})
    assert not lines and (metrics["critic/score/std"], metrics["rollout/groups_equal"]) == (0.5, 0)
    assert (metrics["critic/score/min"], metrics["critic/score/max"]) == (1, 2)


def test_prompts_that_differ_teach_only_where_prompts_are_compared(caplog) -> None:
    scores = [1.0] * 4 + [2.0] * 4
    for estimator, row in ESTIMATORS.items():
        assert bool(warnings(scores, caplog, **{"ppo.estimator": estimator})[1]) == row.needs_groups


def test_what_else_is_worth_a_warning(caplog) -> None:
    grpo = {"ppo.estimator": "grpo"}
    half = [0.0, 20.0, 30.0, 40.0, 0.0, 1.0, 2.0, 50.0]
    assert "cut 50% of the scores" in warnings(half, caplog, **grpo)[1][0]
    some = [1.0] * 4 + [1.0, 2.0, 3.0, 4.0]
    _, lines = warnings(some, caplog, **grpo, **{"rollout.dynamic_sampling": "true"})
    assert len(lines) == 1 and "1 of 2 prompts have equal scores after 4 refills" in lines[0]
    caplog.clear()
    long = QUIET | score_metrics(torch.tensor(some), clip=10, group_size=4) | {"response_length/clip_ratio": 1.0}
    Health(config(**grpo)).rollout(1, torch.tensor(some), long)
    assert "100% of the answers were cut off at rollout.max_new_tokens = 128" in caplog.text


def test_a_bf16_reward_model_needs_the_tolerance(caplog) -> None:
    scores = [1.0, 1.0078125, 1.0, 0.99609375] * 2
    assert not warnings(scores, caplog, **{"ppo.estimator": "grpo"})[1]
    metrics, lines = warnings(scores, caplog, **{"ppo.estimator": "grpo", "reward.equal_tolerance": 0.02})
    assert metrics["rollout/groups_equal"] == 2 and "learns nothing" in lines[0]


def test_a_kind_of_warning_is_said_at_its_1st_10th_and_100th_time(caplog) -> None:
    _, lines = warnings([1.0] * 8, caplog, steps=120)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 10", "step 100"]
    assert lines[2].endswith("(so far at 100 steps)")


@pytest.mark.parametrize("truncation", [{"rollout.top_p": 0.9}, {"rollout.top_k": 20}, {}])
def test_a_truncated_distribution_is_noted_at_the_start(world: Path, truncation: dict[str, object]) -> None:
    from mrlhf.rl.ppo_checks import check_ppo

    given = {
        "model.path": world / "qwen2",
        "data.train": world / "prompts",
        "rollout.max_new_tokens": 8,
        "reward.sources": "examples/rewards/length_penalty.py:length_penalty",
    }
    notes = check_ppo(config(**given, **truncation), 1).notes
    assert [key for key in truncation if f"{key} = {truncation[key]}" in "".join(notes)] == list(truncation)
    assert len(notes) == len(truncation)
