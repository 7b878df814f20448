"""Generation on ranks of its own: one rollout ahead with older weights, killed and resumed to the last bit.
(In turns: ../test_ppo.py.)
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import metrics
from faults.runs import Run, check_equal, ppo

from mrlhf.config.load import load_config
from mrlhf.config.options import PPOStage
from mrlhf.errors import ConfigError, MrlhfError
from mrlhf.rl.rollout.remote import decode_message, encode_message
from mrlhf.rl.rollout.vllm_engine import Answer

AHEAD = {
    "rollout.placement": "separate",
    "rollout.num_ranks": 1,
    "rollout.max_staleness": 1,
    "rollout.correction": "tis",
    "rollout.correction_high": 10,
    "checkpoint.keep_last": 10,
}


def test_one_rollout_ahead_killed_and_resumed(world: Path, tmp_path: Path) -> None:
    """One rank trains, one generates; killed is the one that generates."""
    whole, broken = (Run(tmp_path / name, ppo(world, 4, **AHEAD), ranks=2) for name in ("whole", "broken"))
    whole.finish()
    lines = metrics(whole.directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    # the first rollout is of the trainer's weights, the others are not, and what is between is an update's worth
    assert lines[0]["rollout/logprob_abs_diff_max"] < 1e-3
    assert all(1e-3 < line["rollout/logprob_abs_diff_max"] < 2 for line in lines[1:])
    assert all(line["reshard/bytes"] > 0 and line["timing_s/generators"] > 0 for line in lines)
    assert "1 replica(s) of tensor parallel 1 on 1 separate ranks" in whole.output()
    assert "rank 0: sends" in whole.output() and "rank 1: sends 0.0, receives" in whole.output()
    saved = [p.name for p in (whole.directory / "checkpoints").glob("step_*") if (p / "ahead.bin").is_file()]
    assert sorted(saved) == ["step_1", "step_2", "step_3"]

    broken.start()
    assert broken.until(lambda: (broken.directory / "checkpoints/step_2/ahead.bin").is_file())
    os.kill(broken.beat(1)["pid"], signal.SIGKILL)
    assert broken.wait() != 0 and broken.steps() < 4
    assert "Signal 9 (SIGKILL)" in broken.output() and "rank      : 1 (local_rank: 1)" in broken.output()
    broken.finish()
    assert "resumed from" in broken.output() and "finished: " in broken.output()
    check_equal(whole.directory, broken.directory)


def test_messages_keep_every_digit() -> None:
    answers = [
        Answer([1, 2**31 - 1, 3], [-0.1, -1e-300, -3.0], True),
        Answer([], [], False),
        Answer([4, 5, 6], [-1 / 3], False, ((1, 3),), 0.1, 2),
    ]
    assert decode_message(encode_message({"what": "x", "key": (1, 2)}, answers)) == (
        {"what": "x", "key": [1, 2]},
        answers,
    )
    assert decode_message(encode_message({})) == ({}, [])


def config(**changes: object) -> PPOStage:
    values = {
        "model.path": "m",
        "data.train": "p",
        "train.output_dir": "o",
        "train.global_batch_size": 8,
        "rollout.batch_size": 8,
        "reward.sources": "f.py:f",
        **changes,
    }
    return load_config(PPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)])


def test_contradictions_are_refused() -> None:
    separate = {"rollout.placement": "separate", "rollout.num_ranks": 2}
    assert config(**separate).rollout.max_staleness == 0
    assert config(**separate, **{"rollout.max_staleness": 1, "rollout.correction": "icepop"}).rollout.num_ranks == 2
    for changes, message in (
        ({"rollout.placement": "separate"}, "separate needs rollout.num_ranks"),
        ({"rollout.num_ranks": 2}, "colocated every rank generates"),
        ({"rollout.placement": "separate", "rollout.num_ranks": 0}, "rollout.num_ranks = 0"),
        ({"rollout.max_staleness": 1}, "rollout.max_staleness = 1 with rollout.placement = colocated"),
        ({**separate, "rollout.max_staleness": 2}, "rollout.max_staleness = 2"),
        ({**separate, "rollout.max_staleness": -1}, "rollout.max_staleness = -1"),
        ({**separate, "rollout.max_staleness": 1}, "rollout.correction = none does not correct for it"),
    ):
        with pytest.raises(MrlhfError, match=message):
            config(**changes)


def test_sizes_that_do_not_fit_the_ranks_are_refused(world: Path) -> None:
    from mrlhf.rl.ppo_checks import check_ppo

    given = {
        "model.path": world / "qwen2",
        "data.train": world / "prompts",
        "reward.sources": "examples/rewards/length_penalty.py:length_penalty",
        "rollout.placement": "separate",
    }
    with pytest.raises(ConfigError, match=r"rollout.num_ranks = 2 of 2 ranks leave none to train") as caught:
        check_ppo(config(**given, **{"rollout.num_ranks": 2, "parallel.tensor_model_parallel_size": 2}), 2)
    assert caught.value.expected == "torchrun with 4 ranks or more"
    with pytest.raises(ConfigError, match="rollout.tensor_parallel_size = 2 does not divide the 3 ranks"):
        check_ppo(config(**given, **{"rollout.num_ranks": 3, "rollout.tensor_parallel_size": 2}), 5)
    with pytest.raises(MrlhfError, match="3"):
        check_ppo(config(**given, **{"rollout.num_ranks": 1, "parallel.tensor_model_parallel_size": 2}), 4)
    assert (
        check_ppo(config(**given, **{"rollout.num_ranks": 2, "rollout.tensor_parallel_size": 2}), 3).train.num_samples
        > 0
    )
