"""The run directory: one line a step, also after a kill; no secrets; extras that cannot end a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from disks import empty, fill, small_disk

from mrlhf.observe.report import read_jsonl
from mrlhf.observe.tracker import Tracker, _lines_until, collect_env, redact


def tracker(folder: Path, **changes) -> Tracker:
    given = {
        "config_yaml": "train:\n  seed: 1\n",
        "env": None,
        "is_main": True,
        "stage": "sft",
        "total_steps": 100,
        "start_step": 0,
        "log_interval": 1,
        "tensorboard": False,
    }
    return Tracker(folder, **{**given, **changes})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_writes_the_run_directory(tmp_path, capsys):
    run = tracker(tmp_path / "a" / "run", env={"device": "cpu"})
    run.log(1, {"train/lr": 1e-4, "train/loss": 1 / 3, "time/step_s": 2.0})
    run.log(1, {"eval/loss": 0.25})
    run.samples(1, [{"prompt": "ü", "score": 1.5}])
    run.close()
    folder = tmp_path / "a" / "run"
    assert (folder / "config.yaml").read_text() == "train:\n  seed: 1\n"
    assert lines(folder) == [
        {"step": 1, "train/loss": 1 / 3, "train/lr": 1e-4, "time/step_s": 2.0},
        {"step": 1, "eval/loss": 0.25},
    ]
    assert list(lines(folder)[0]) == ["step", "train/loss", "train/lr", "time/step_s"]
    assert json.loads((folder / "samples" / "step_1.jsonl").read_text()) == {"prompt": "ü", "score": 1.5}
    env = json.loads((folder / "env.json").read_text())
    assert (
        env["device"] == "cpu"
        and env["stage"] == "sft"
        and env["versions"]["torch"]
        and env["argv"]
        and "started" in env
    )
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert capsys.readouterr().out.splitlines() == [
        "step   1/100 | loss  0.3333 | lr 1.0e-04 | ETA 0:03:18",
        "step   1/100 | eval loss 0.2500",
    ]


def test_console_line_of_sft_and_ppo(tmp_path):
    run = tracker(tmp_path)
    line = run.console_line(
        12,
        {
            "train/loss": 1.2345,
            "train/grad_norm": 0.93,
            "train/lr": 1e-4,
            "perf/tokens_per_s_per_gpu": 1234.4,
            "time/step_s": 2,
        },
    )
    assert line == "step  12/100 | loss  1.2345 | grad_norm   0.93 | lr 1.0e-04 |   1234 tok/s | ETA 0:02:56"
    ppo = {
        "critic/score/mean": 0.5,
        "objective/kl": 0.01,
        "response_length/mean": 12.5,
        "actor/pg_loss": -0.02,
        "critic/vf_loss": 0.3,
        "rollout/tokens_per_s": 99.0,
        "timing_s/step": 3600.0,
    }
    assert run.console_line(99, ppo) == (
        "step  99/100 | score   0.500 | kl   0.0100 | len   12.5 | pg  -0.0200 | vf  0.3000 |     99 tok/s | "
        "ETA 1:00:00"
    )
    assert line.isascii()
    huge = run.console_line(99, {"critic/score/mean": -1.25e29, "actor/grad_norm": 123456789.0})
    assert "| score -1.3e+29 | grad_norm 1.2e+08 |" in huge
    assert "| eval score/mean 1.0e+30" in run.console_line(99, {"eval/score/mean": 1e30})


def test_log_interval_thins_the_console_only(tmp_path, capsys):
    run = tracker(tmp_path, log_interval=4, total_steps=10)
    for step in range(1, 11):
        run.log(step, {"train/loss": 1.0})
    assert [line.split("|")[0].split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "1/10",
        "4/10",
        "8/10",
        "10/10",
    ]
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 11))


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    run = tracker(tmp_path)
    for step in range(1, 8):
        run.log(step, {"train/loss": 1.0})
        if step == 4:
            run.log(step, {"eval/loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "train/lo')
    run = tracker(tmp_path, start_step=4)
    run.log(5, {"train/loss": 9.0})
    assert [(row["step"], *list(row)[1:]) for row in lines(tmp_path)] == [
        (1, "train/loss"),
        (2, "train/loss"),
        (3, "train/loss"),
        (4, "train/loss"),
        (4, "eval/loss"),
        (5, "train/loss"),
    ]
    assert lines(tmp_path)[-1]["train/loss"] == 9.0
    tracker(tmp_path, start_step=0).close()
    assert lines(tmp_path) == []


def test_values_that_json_cannot_hold_are_null(tmp_path):
    run = tracker(tmp_path)
    run.log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    assert lines(tmp_path) == [{"step": 1, "train/loss": None, "train/grad_norm": None}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = tracker(tmp_path / "x", is_main=False, tensorboard=True, wandb_project="p")
    run.log(1, {"train/loss": 1.0})
    run.samples(1, [{}])
    run.close()
    assert not (tmp_path / "x").exists() and capsys.readouterr().out == ""


def test_unknown_metric_is_noted_once(tmp_path, capsys):
    run = tracker(tmp_path)
    run.log(1, {"train/los": 1.0})
    run.log(2, {"train/los": 1.0})
    assert capsys.readouterr().err == "warning: metric train/los is not in mrlhf.observe.metrics.METRICS\n"


def test_missing_package_is_noted_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tracker(tmp_path, wandb_project="p")
    run.log(1, {"train/loss": 1.0})
    run.close()
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "pip install 'mrlhf[wandb]'" in err
    assert len(lines(tmp_path)) == 1


class FakeRun:
    def __init__(self, fail_at: int):
        self.id, self.fail_at, self.logged, self.finished = "abc", fail_at, [], False

    def log(self, values, step):
        if step == self.fail_at:
            raise RuntimeError("network is down, token hf_abcdefghijklmnopqrstuv")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, fail_at: int) -> tuple[FakeRun, list[dict]]:
    run, calls = FakeRun(fail_at), []
    module = types.SimpleNamespace(init=lambda **kw: (calls.append(kw), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run, calls


def test_a_logger_that_breaks_is_switched_off(tmp_path, capsys, monkeypatch):
    run, _ = fake_wandb(monkeypatch, fail_at=2)
    t = tracker(tmp_path, wandb_project="p")
    for step in (1, 2, 3):
        t.log(step, {"train/loss": 1.0})
    t.close()
    err = capsys.readouterr().err
    assert err.count("wandb failed and is switched off") == 1 and "hf_abc" not in err
    assert run.logged == [(1, {"train/loss": 1.0})] and len(lines(tmp_path)) == 3


def test_a_full_disk_does_not_end_a_run(tmp_path, capsys):
    try:
        with small_disk(tmp_path / "disk", 1) as disk:
            run = tracker(disk / "run")
            fill(disk)
            for step in range(1, 30):
                run.log(
                    step,
                    {
                        "train/loss": 1 / step,
                        **{f"train/{name}": 0.1234567890123 for name in ("lr", "grad_norm", "num_tokens")},
                    },
                )
            run.samples(29, [{"prompt": "a" * 5000}])
            assert len((disk / "run/metrics.jsonl").read_bytes()) < 4097
            empty(disk)
            run.log(30, {"train/loss": 1.0})
            run.close()
            assert [line["step"] for line in lines(disk / "run")] == list(range(1, 31))
            assert [p for p in (disk / "run").rglob(".*") if p.is_file()] == []
    except OSError as error:
        pytest.skip(f"this process may not mount a small disk: {error}")
    warnings = capsys.readouterr().err.splitlines()
    assert (
        len(warnings) == 2
        and "metrics.jsonl cannot be written: No space left" in warnings[0]
        and "samples/step_29.jsonl" in warnings[1]
    )


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    run, calls = fake_wandb(monkeypatch, fail_at=-1)
    tracker(tmp_path, wandb_project="p").close()
    tracker(tmp_path, wandb_project="p", start_step=3).close()
    assert [c["id"] for c in calls] == [None, "abc"] and run.finished


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    run = tracker(tmp_path, tensorboard=True)
    run.log(1, {"train/loss": 1.5})
    run.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.5)]


def test_secrets_are_redacted(monkeypatch):
    token = "hf_" + "a" * 30
    argv = [
        "mrlhf",
        "--api-key",
        "s3cret",
        "--password=hunter2",
        "--x",
        token,
        "--rollout.max_new_tokens",
        "128",
        "--reward.http_token_env",
        "MY_VAR",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--reward.sources", "http://me:pw@host/score?token=abc123&n=1"])
    monkeypatch.setenv("HF_TOKEN", "whatever")
    monkeypatch.setenv("HF_HOME", "/cache")
    env = collect_env()
    assert env["argv"] == [
        "mrlhf", "--api-key", "<redacted>", "--password=<redacted>", "--x", "<redacted>",
        "--rollout.max_new_tokens", "128", "--reward.http_token_env", "MY_VAR",
        "--reward.sources", "http://<redacted>@host/score?token=<redacted>&n=1",
    ]  # fmt: skip
    assert env["env"]["HF_TOKEN"] == "<redacted>" and env["env"]["HF_HOME"] == "/cache"
    assert redact({"a": [{"secret": "x", "tokens": "7"}], "n": 3}) == {
        "a": [{"secret": "<redacted>", "tokens": "7"}],
        "n": 3,
    }


def test_lines_of_anything_are_dropped_and_read(tmp_path: Path) -> None:
    file, good = tmp_path / "metrics.jsonl", '{"step": 1, "train/loss": 1.0}\n'
    file.write_text(good + '{"step": "two"}\n{"step": null}\n[1]\n' + "[" * 99999 + "\n")
    assert _lines_until(file, 5) == [good]
    file.write_bytes(b'{"text": "\xe4"}\n' + good.encode())
    assert read_jsonl(file) == [{"text": "\ufffd"}, json.loads(good)]
