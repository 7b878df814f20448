"""How a run ends: what a signal does, what an error keeps, in which order its parts end; and when it saves."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TESTS, mrlhf, python

from mrlhf.checkpoint.manifest import check_manifest
from mrlhf.training import run as run_module
from mrlhf.training.run import Run, SupervisedRun


def test_signals() -> None:
    """SIGINT is as SIGTERM; the second ends the process at once, as does the first before the first step."""
    out = python(TESTS / "training/stopping_program.py").stdout
    statuses = json.loads(out.partition("RESULT ")[2].splitlines()[0])
    at_once = {"before the first step", "SIGINT twice", "SIGINT, SIGTERM", "SIGINT twice, no store"}
    assert statuses == {name: 130 if name in at_once else 0 for name in statuses} and at_once < set(statuses), out
    assert out.count("a second Ctrl-C ends it at once") >= 1


class Bare(Run):
    """A run whose parts only note what is asked of them."""

    def __init__(self, total_steps: int, save_interval: int | None) -> None:
        self.calls: list[str] = []

        def noting(name: str) -> Any:
            return SimpleNamespace(
                **{
                    call: lambda *_, call=call, **__: self.calls.append(f"{name}.{call}")
                    for call in ("finish", "close", "release", "start_step")
                }
            )

        self.done, self.total_steps, self.finished, self.status = 0, total_steps, False, 0
        self._save_next = False
        self.config: Any = SimpleNamespace(checkpoint=SimpleNamespace(save_interval=save_interval))
        self.saver = noting("saver")
        self.saver.seconds, self._lock, self.closing_line = 0.0, noting("lock"), "the end"
        self.saver.failed_exports, self._export_missing = [], lambda: None  # type: ignore[method-assign]
        self.stopper: Any = SimpleNamespace(start_step=lambda: None, agree_to_stop=lambda **_: False)
        self.phase: Any = SimpleNamespace(start_step=lambda _: None, step_seconds=lambda: 600.0)
        self.tracker = noting("tracker")

    def save(self, step: int) -> None:
        self.calls.append(f"save {step}")
        self._saved_at = run_module.time.monotonic()

    def close_parts(self) -> None:
        self.calls.append("parts")

    def _make_tracker(self) -> Any:
        return self.tracker


@pytest.mark.parametrize(
    ("interval", "saved"), [(None, [3, 6, 9, 11]), (4, [4, 8, 11]), (0, [11])], ids=["default", "steps", "the end"]
)
def test_when_a_run_saves(interval: int | None, saved: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of ten minutes: by default no more than half an hour is lost."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(run_module.state, "on_any_rank", bool)
    monkeypatch.setattr(run_module.gc, "freeze", lambda: None)
    run = Bare(11, interval)
    for step in run.steps():
        clock.now += 600.0
        if run.due_save(step):
            run.save(step)
    assert run.calls == [f"save {step}" for step in saved]


def test_a_save_ends_before_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's end destroys torch's default group, without which a save in the background cannot be completed."""
    run = Bare(1, None)
    monkeypatch.setattr(run_module.state, "shutdown", lambda: run.calls.append("groups"))
    run.close()
    assert run.calls == ["saver.finish", "parts", "tracker.close", "groups", "lock.release"]


@pytest.mark.parametrize("stops_at", [0, 2, 9])
def test_a_stop_ends_an_evaluation(stops_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be long, and launchers do not wait: torchrun kills after 30 s."""
    monkeypatch.setattr(run_module.state, "on_any_rank", bool)
    run: Any = SupervisedRun.__new__(SupervisedRun)
    evaluated: list[Any] = []
    run.phase = lambda *_: contextlib.nullcontext()
    run.eval_loader = SimpleNamespace(in_order=lambda: range(4), micro_batches=lambda rows: [rows])
    run.stopper = SimpleNamespace(requested=lambda: len(evaluated) == stops_at)
    run.trainer = SimpleNamespace(evaluate=lambda batches, _: evaluated.append(batches) or {})
    run.log_evaluation = lambda *_: evaluated.append("logged")
    run.evaluate(3, lambda *_: None)
    assert evaluated == [[0], [1], [2], [3], "logged"][: min(stops_at, 5)]


def sft(world: Path, run: Path, **more: object) -> list[object]:
    options = {
        "model.path": world / "qwen2",
        "model.dtype": "float32",
        "data.train": world / "sft",
        "train.output_dir": run,
        "train.global_batch_size": 4,
        "train.max_steps": 9,
        "logging.tensorboard": "false",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return ["sft", *(part for key, value in options.items() for part in (f"--{key}", value))]


def test_a_loss_that_is_not_finite_ends_in_a_message(world: Path, tmp_path: Path) -> None:
    """True about checkpoints: of a save in the background that was under way too."""
    wrong = mrlhf(*sft(world, tmp_path / "a", optim__lr=1e30), check=False)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and wrong.stderr.count("NotFinite: ") == 1
    assert "fix:      a lower learning rate" in wrong.stderr
    assert "kept:     nothing: this run has no checkpoint yet" in wrong.stderr
    saving = {"checkpoint__save_interval": 1, "checkpoint__async_save": "true", "optim__lr": 1e30}
    wrong = mrlhf(*sft(world, tmp_path / "b", **saving), check=False)
    kept = tmp_path / "b/checkpoints/step_1"
    assert wrong.returncode == 2 and f"kept:     {kept}: the same command continues" in wrong.stderr
    check_manifest(kept, verify="hash")


REWARD = """
from pathlib import Path

def score(prompts, completions, **columns):
    calls = Path(__file__).with_suffix(".calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if len(calls.read_text()) == {fails_at}:
        raise ValueError("no scores today")
    return [float(len(completion)) for completion in completions]
"""


def test_ppo_keeps_its_steps(world: Path, tmp_path: Path) -> None:
    """A run that stops with a save in the background, while vLLM is alive; then one that a reward function ends: both
    keep the last complete step, though no save was due.
    """
    function, run = tmp_path / "reward.py", tmp_path / "run"
    function.write_text(REWARD.format(fails_at=3))
    options = {
        "model.path": world / "qwen2",
        "model.dtype": "float32",
        "data.train": world / "prompts",
        "train.output_dir": run,
        "train.global_batch_size": 8,
        "train.max_steps": 4,
        "rollout.batch_size": 8,
        "rollout.max_new_tokens": 8,
        "rollout.kv_cache_mib": 64,
        "reward.sources": f"{function}:score",
        "checkpoint.async_save": "true",
        "logging.tensorboard": "false",
    }
    args = ["ppo", *(part for key, value in options.items() for part in (f"--{key}", value))]
    stopped = mrlhf(*args, "--train.exit_duration_minutes", 0.0001, check=False)
    assert stopped.returncode == 75, stopped.stderr
    check_manifest(run / "checkpoints/step_1", verify="hash")
    failed = mrlhf(*args, check=False)
    assert failed.returncode == 2 and "no scores today" in failed.stderr and "Traceback" not in failed.stderr
    assert f"kept:     {run}/checkpoints/step_2: the same command continues" in failed.stderr
    check_manifest(run / "checkpoints/step_2", verify="hash")
    assert "resumed from" in mrlhf(*args).stdout and (run / "checkpoints/step_4").is_dir()
