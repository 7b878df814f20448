"""Dynamic sampling: groups without signal are replaced, every prompt is drawn once, and a run goes on where it was."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrlhf.config.load import load_config
from mrlhf.config.options import PPOStage
from mrlhf.errors import CheckpointError, MrlhfError
from mrlhf.rl.ppo import PPO
from mrlhf.rl.rollout.prompts import Prompts
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.rollout.vllm_engine import Answer
from mrlhf.rl.shaping import RunningStd


def config(**changes: object) -> PPOStage:
    values = {
        "model.path": "m",
        "data.train": "p",
        "train.output_dir": "o",
        "train.global_batch_size": 6,
        "rollout.batch_size": 3,
        "rollout.n": 2,
        "reward.sources": "f.py:f",
        "ppo.estimator": "grpo",
        "rollout.dynamic_sampling": "true",
        "rollout.max_refills": 3,
        **changes,
    }
    return load_config(PPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)])


def data(rows: int = 20, identity: str = "x") -> Any:
    return SimpleNamespace(prefix="p", task="prompts", num_samples=rows, num_packs=rows, identity=identity)


def make(equal: set[int], **changes: object) -> Any:
    """A PPO of collect alone; the answers to the rows in `equal` all score the same."""
    ppo = object.__new__(PPO)
    ppo.config, ppo.inputs = config(**changes), SimpleNamespace(train=data())
    ppo.prompts = Prompts(ppo.config, ppo.inputs.train)
    ppo.total_steps, ppo.phase = ppo.prompts.total_steps, lambda name, step: nullcontext()
    ppo.sampler = SimpleNamespace(generation_metrics=dict)
    ppo.rewards, ppo.offload = SimpleNamespace(models={}), SimpleNamespace(using=nullcontext, generating=nullcontext)
    ppo.calls = []

    def generate(data: Any, rows: list[int], *, step: int, n: int, sampling: Any, first: int = 0) -> Rollout:
        ppo.calls.append((step, first, rows))
        keys = [(row, i) for row in rows for i in range(n)]
        return Rollout([[row] for row, _ in keys], [Answer([i], [0.0], True) for _, i in keys], [None] * len(keys))

    def score(rollout: Rollout) -> tuple[torch.Tensor, dict[str, float]]:
        scores = [
            0.5 if p[0] in equal else float(a.tokens[0]) for p, a in zip(rollout.prompts, rollout.answers, strict=True)
        ]
        return torch.tensor(scores), {"reward/f": sum(scores) / len(scores)}

    ppo.generate, ppo.score, ppo.sampling = generate, score, None
    return ppo


def rows_of(rollout: Rollout) -> list[int]:
    return [p[0] for p in rollout.prompts[::2]]


def test_groups_without_signal_are_replaced_by_the_next_prompts() -> None:
    order = make(set(), **{"rollout.dynamic_sampling": "false"}).prompts.order.span(0, 20)
    ppo = make({order[1], order[3], order[4]})
    rollout, scores, log = ppo.collect(1)
    assert rows_of(rollout) == [order[0], order[2], order[5]] and scores.tolist() == [0.0, 1.0] * 3
    assert ppo.calls == [(1, 0, order[:3]), (1, 3, [order[3]]), (1, 4, [order[4]]), (1, 5, [order[5]])], (
        "exactly what was missing is drawn"
    )
    assert (log["rollout/prompts_drawn"], log["rollout/groups_dropped"], log["rollout/groups_equal"]) == (6, 3, 0)
    assert log["reward/f"] == pytest.approx(0.5), "over all that were scored"
    second, _, log = ppo.collect(2)
    assert rows_of(second) == order[6:9] and log["rollout/groups_dropped"] == 0

    # a run that was killed after the first rollout goes on with the same prompts
    killed = make({order[1], order[3], order[4]})
    killed.collect(1)
    manifest = {"step": 1, **killed.prompts.state()}
    again = make(set())
    again.prompts.restore(manifest, where="c")
    assert rows_of(again.collect(2)[0]) == rows_of(second)
    assert again.prompts.metrics()["train/epoch"] == 9 / 20
    with pytest.raises(CheckpointError, match="was changed"):
        Prompts(config(), data(identity="y")).restore(manifest, where="c")


def test_refills_end() -> None:
    ppo = make(set(range(20)))
    rollout, scores, log = ppo.collect(1)
    assert len(ppo.calls) == 4 and rollout.size == 6, "the last refill is taken as it comes"
    assert (log["rollout/prompts_drawn"], log["rollout/groups_dropped"], log["rollout/groups_equal"]) == (12, 9, 3)
    assert scores.tolist() == [0.5] * 6
    _, _, log = make(set(range(20)), **{"rollout.dynamic_sampling": "false"}).collect(1)
    assert not any(key.startswith("rollout/") for key in log)


def test_more_rollouts_than_prompts_go_on_into_new_epochs() -> None:
    ppo = make(set())
    seen = [row for step in range(1, 15) for row in rows_of(ppo.collect(step)[0])]
    assert sorted(seen[:20]) == list(range(20)) and sorted(seen[20:40]) == list(range(20)) and seen[:20] != seen[20:40]


def test_scores_are_shaped_before_they_are_clipped() -> None:
    ppo = make(
        set(),
        **{
            "reward.overlong_buffer": 4,
            "reward.overlong_penalty": 2.0,
            "rollout.max_new_tokens": 8,
            "rollout.n": 3,
            "train.global_batch_size": 9,
            "reward.scaling": "running_std",
        },
    )
    ppo.running_std = RunningStd()
    answers = [Answer([1] * n, [0.0] * n, True) for n in (4, 6, 8)]
    shaped = ppo.shape_scores(Rollout([[1]] * 3, answers, [None] * 3), torch.tensor([1.0, 1.0, 5.0]))
    std = torch.tensor([1.0, 0.0, 3.0]).std(unbiased=False)
    torch.testing.assert_close(shaped, torch.tensor([1.0, 0.0, 3.0]) / std)


def test_contradictions_are_refused() -> None:
    for changes, message in (
        ({"ppo.estimator": "gae"}, "rollout.dynamic_sampling compares"),
        ({"reward.overlong_buffer": 1000}, "longer than an answer"),
        ({"ptx.coef": 0.1}, "needs a data set"),
        (
            {"ptx.coef": 0.1, "ptx.data": "d", "ptx.batch_size": 6, "ptx.micro_batch_size": 4},
            "ptx.micro_batch_size = 4 does not divide",
        ),
    ):
        with pytest.raises(MrlhfError, match=message):
            config(**changes)
