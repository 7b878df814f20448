"""What is wrong with a PPO run before it starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mrlhf.config.load import load_config
from mrlhf.config.options import PPOStage
from mrlhf.rl.ppo_checks import _check_stop_tokens


@pytest.mark.parametrize(("given", "beyond"), [("", None), ("0,322", None), ("2,323,128009", "323, 128009")])
def test_stop_tokens_that_the_model_does_not_have(given: str, beyond: str | None) -> None:
    """Such as those of another model: vLLM refused them with a traceback at the first rollout."""
    values = {"model.path": "m", "data.train": "p", "train.output_dir": "o", "train.global_batch_size": 8}
    values |= {"rollout.batch_size": 8, "reward.sources": "f.py:f"}
    flags = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    config = load_config(PPOStage, None, [*flags, f"--rollout.stop_token_ids=[{given}]"])
    source: Any = SimpleNamespace(path="m", spec=SimpleNamespace(vocab_size=323))
    errors = _check_stop_tokens(config, source)
    assert bool(errors) == (beyond is not None)
    for error in errors:
        assert f"stop_token_ids = {beyond}: m has no such token" in str(error) and error.expected == "0 to 322"
