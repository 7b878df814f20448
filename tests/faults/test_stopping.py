"""Signals, the wall-clock budget and restarts by torchrun."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import mrlhf

from faults.runs import Run, check_equal, last, ppo, sft

STEPS = 40


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT on two ranks that nobody disturbs."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", sft(world, STEPS, **{"checkpoint.save_interval": 30}), ranks=2)
    run.finish()
    return run.directory


def test_one_rank_is_warned_and_torchrun_is_ended(world: Path, tmp_path: Path, whole: Path) -> None:
    """SIGUSR1 to one rank, then SIGTERM (twice) to torchrun, then its Ctrl-C:
    saved at that step each time, status 75 of every rank, and the end is the same.
    """
    run = Run(tmp_path / "run", sft(world, STEPS, **{"checkpoint.save_interval": 30}), ranks=2)
    run.start()
    assert run.until(lambda: run.steps() >= 3 and run.beat(1).get("pid"))
    os.kill(run.beat(1)["pid"], signal.SIGUSR1)
    assert run.wait() == 1  # torchrun's own
    assert "stopped by SIGUSR1 (rank 1) after step" in run.output() and "exitcode  : 75" in run.output()
    first = int(last(run.directory).name[5:])
    assert 3 <= first < 30 and first == run.steps(), "saved where it stood, not at the interval"
    run.start()
    assert run.until(lambda: run.steps() >= first + 3)
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() != 0
    assert "stopped by SIGTERM" in run.output()
    second = int(last(run.directory).name[5:])
    assert second == run.steps() > first
    run.start()
    assert run.until(lambda: run.steps() >= second + 2)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() != 0
    assert "stopped by SIGINT" in run.output() and int(last(run.directory).name[5:]) == run.steps() > second
    run.finish()
    check_equal(whole, run.directory)


def test_a_rank_that_stands_still_is_named(world: Path, tmp_path: Path) -> None:
    """And while it runs, a second run of the same directory is refused before it touches anything."""
    run = Run(
        tmp_path / "run", sft(world, 100_000, **{"checkpoint.save_interval": 0, "parallel.silence_seconds": 5}), ranks=2
    )
    run.start()
    assert run.until(lambda: run.steps() >= 3 and run.beat(1).get("pid")), run.output()[-4000:]
    stopped = run.beat(1)["pid"]
    config = run.directory / "config.yaml"
    written = config.stat().st_mtime_ns
    refused = mrlhf(*run.args, "--train.output_dir", run.directory, ranks=2, check=False)
    # more than 3 s have gone: the rank's sign comes every second, and tells of a step by now
    assert f"pid {run.beat(0)['pid']}, since" in refused.stderr and config.stat().st_mtime_ns == written
    assert run.beat(1)["pid"] == stopped
    os.kill(stopped, signal.SIGSTOP)
    assert run.until(lambda: "RankProblem" in run.output(), 60)
    os.kill(stopped, signal.SIGKILL)  # torchrun would give it 30 s to answer SIGTERM
    assert run.wait(60) != 0 and "exitcode  : 70" in run.output()
    assert re.search(
        rf"rank 1 \(.*pid {stopped}\) has given no sign of life for \d+ s; it was in 'step \d+'", run.output()
    )
    assert "mrlhf/sft.py" in (run.directory / "logs/stacks_rank_0.txt").read_text()


def test_torchrun_starts_the_ranks_again(world: Path, tmp_path: Path, whole: Path) -> None:
    run = Run(
        tmp_path / "run", sft(world, STEPS, **{"checkpoint.save_interval": 5}), ranks=2, launcher=("--max-restarts", 3)
    )
    run.start()
    for at in (7, 22):
        assert run.until(lambda at=at: run.steps() >= at and run.beat(1).get("pid"))
        os.kill(run.beat(1)["pid"], signal.SIGKILL)
        (run.directory / "heartbeat/rank_1.json").unlink()
    assert run.wait() == 0, run.output()[-4000:]
    assert run.output().count("resumed from") == 2
    check_equal(whole, run.directory)


def test_the_budget_of_time(world: Path, tmp_path: Path) -> None:
    run = Run(
        tmp_path / "run", sft(world, 100_000, **{"checkpoint.save_interval": 0, "train.exit_duration_minutes": 0.2})
    )
    run.start()
    assert run.until(lambda: run.beat().get("pid"))
    assert run.wait(60) == 75  # after 12 s and the leaving of torch; without the budget it would go on for hours
    assert "stopped by train.exit_duration_minutes after step" in run.output()
    assert int(last(run.directory).name[5:]) == run.steps() >= 1


@pytest.mark.soak
def test_a_long_rollout_is_left(world: Path, tmp_path: Path) -> None:
    """SIGTERM while vLLM writes: the state after the rollout before is saved, and goes on as if nothing had been."""
    long = {
        "rollout.n": 16,
        "rollout.max_new_tokens": 48,
        "rollout.max_num_seqs": 8,
        "ppo.epochs": 1,
        "train.global_batch_size": 64,
    }
    args = ppo(world, 2, **{**long, "checkpoint.save_interval": 0})
    unbroken, run = Run(tmp_path / "whole", args), Run(tmp_path / "run", args)
    unbroken.finish()
    run.start()
    assert run.until(lambda: run.steps() == 1)
    time.sleep(0.5)
    assert run.steps() == 1, "the second rollout is too short for this test"
    start = time.monotonic()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait(60) == 75, run.output()[-4000:]
    print(f"left after {time.monotonic() - start:.1f} s")
    assert "stopped by SIGTERM (rank 0) after step 1" in run.output() and last(run.directory).name == "step_1"
    run.finish()
    check_equal(unbroken.directory, run.directory)
