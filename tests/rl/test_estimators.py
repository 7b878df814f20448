"""A new estimator is one function and one row of mrlhf.rl.estimators:
the option, the checks, the docs and the maths read the table.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, run

from mrlhf.config.load import load_config
from mrlhf.config.options import PPOStage
from mrlhf.config.schema import help_text
from mrlhf.errors import ConfigError, MrlhfError
from mrlhf.rl.advantages import compute_advantages, gae, group_scores
from mrlhf.rl.estimators import ESTIMATORS, Estimator, markdown_table


def config(estimator: str, **changes: object) -> PPOStage:
    values = {
        "model.path": "m",
        "data.train": "p",
        "train.output_dir": "o",
        "train.global_batch_size": 6,
        "rollout.batch_size": 3,
        "rollout.n": 4,
        "reward.sources": "f.py:f",
        "ppo.estimator": estimator,
        **changes,
    }
    return load_config(PPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)])


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Any:
    """add(name, function, **flags): one function, one row."""
    module = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", module)

    def add(name: str, function: Any, **flags: bool) -> None:
        setattr(module, name, function)
        monkeypatch.setitem(
            ESTIMATORS, name, Estimator(name, f"made_up:{name}", "r - median(group)", "nobody", **flags)
        )

    return add


def test_a_made_up_estimator_without_a_critic(add: Any) -> None:
    add(
        "median",
        lambda scores_GN: scores_GN - scores_GN.median(1, keepdim=True).values,
        needs_groups=True,
        undiscounted=True,
    )
    assert config("median").ppo.estimator == "median"
    assert (
        "dr_grpo,median}" in help_text("ppo")
        and "| `median` | r - median(group) | 2 or more | nobody |" in markdown_table()
    )
    for changes, message in (
        ({"rollout.n": 1}, "ppo.estimator = median compares the answers of one prompt"),
        ({"ppo.gamma": 0.9}, "ppo.estimator = median has gamma 1"),
        ({"ppo.critic_tensor_model_parallel_size": 2}, "ppo.estimator = median has no critic"),
    ):
        with pytest.raises(MrlhfError, match=message):
            config("median", **{"rollout.batch_size": 12, **changes})
    assert config("median", **{"rollout.dynamic_sampling": "true"}).rollout.dynamic_sampling
    with pytest.raises(MrlhfError, match="medain is not a choice; did you mean median") as raised:
        config("medain")
    assert "{gae,reinforce,reinforce_baseline,rloo,grpo,dr_grpo,median}" in str(raised.value)

    scores, mask = torch.tensor([1.0, 2.0, 9.0, 5.0, 5.0, 5.0]), torch.ones(6, 2)
    assert group_scores(scores, estimator="median", group_size=3).tolist() == [-1, 0, 7, 0, 0, 0]
    with pytest.raises(ConfigError, match="too small"):
        group_scores(scores, estimator="median", group_size=1)
    advantages, returns, rewards = compute_advantages(
        scores, torch.zeros(6, 2), None, mask, estimator="median", group_size=3, beta=0.0, clip=5.0, gamma=1.0, lam=1.0
    )
    assert advantages.tolist() == returns.tolist() == [[-1, -1], [0, 0], [3, 3], [0, 0], [0, 0], [0, 0]], (
        "clipped to 5 before the median"
    )
    assert rewards[2].tolist() == [0, 3]


def test_a_made_up_estimator_with_a_critic(add: Any) -> None:
    add(
        "td",
        lambda rewards, values, mask, *, gamma, lam: gae(rewards, values, mask, gamma=gamma, lam=0.0),
        needs_critic=True,
    )
    row = config("td", **{"ppo.critic_tensor_model_parallel_size": 2}).ppo.estimator_row
    assert row.needs_critic and not row.whitens
    with pytest.raises(ConfigError, match="'td' is unknown"):
        group_scores(torch.ones(2), estimator="td", group_size=2)
    x = torch.tensor([[1.0, 2.0]])
    advantages, returns, _ = compute_advantages(
        torch.tensor([3.0]),
        x,
        x,
        torch.ones(1, 2),
        estimator="td",
        group_size=1,
        beta=0.0,
        clip=9.0,
        gamma=1.0,
        lam=0.9,
    )
    assert advantages.tolist() == [[1, 1]] and returns.tolist() == [[2, 3]]


def test_the_docs_have_the_table() -> None:
    assert markdown_table() in (ROOT / "docs/rl.md").read_text()


def test_every_row_names_a_function() -> None:
    assert all(callable(row.resolve()) and name == row.name for name, row in ESTIMATORS.items())
    assert (
        run(
            sys.executable,
            "-c",
            "import sys, mrlhf.config.schema as c; c.help_text('ppo'); print('torch' in sys.modules)",
        ).stdout
        == "False\n"
    )
