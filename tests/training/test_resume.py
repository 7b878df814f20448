"""A run that was killed and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment, metrics, mrlhf

from mrlhf.checkpoint.source import open_source
from mrlhf.errors import CheckpointError
from mrlhf.observe.metrics import EVALUATED

_TIMES = ("time/", "timing_s/", "perf/", "memory/", "reshard/seconds", "rollout/tokens_per_s")


def comparable(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith(_TIMES)} for line in metrics(run_dir)]


def kill_after(run_dir: Path, step: int, args: list[object]) -> None:
    """Start the command, SIGKILL all of it once `step` is logged and its checkpoint of an earlier step is whole."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mrlhf", *map(str, args)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log, end = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not (
        log.is_file() and len(log.read_text().splitlines()) >= step and (run_dir / "checkpoints/latest").is_file()
    ):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(tmp_path: Path, args: list[object], *, kill_at: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    mrlhf(*args, "--train.output_dir", whole)
    kill_after(broken, kill_at, [*args, "--train.output_dir", broken])
    before = len(metrics(broken))
    again = mrlhf(*args, "--train.output_dir", broken)
    assert "resumed from" in again.stdout
    assert comparable(whole) == comparable(broken)
    assert before < len(metrics(whole)), "nothing was left to resume"
    last = sorted((whole / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))[-1].name
    for path in (whole, broken):
        assert json.loads((path / "checkpoints" / last / "mrlhf.json").read_text())["step"] == int(last[5:])
        mrlhf(
            "score",
            "--checkpoint",
            path,
            "--data",
            args[args.index("--data.train") + 1],
            "--output",
            path / "scores.jsonl",
            "--dtype",
            "float32",
        )
    assert (whole / "scores.jsonl").read_bytes() == (broken / "scores.jsonl").read_bytes()


def test_sft_killed_and_resumed(world: Path, tmp_path: Path) -> None:
    args = ["sft", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", world / "sft",
            "--train.global_batch_size", 2, "--train.num_epochs", 5, "--optim.lr", 1e-3,
            "--optim.lr_warmup_steps", 3, "--checkpoint.save_interval", 4, "--data.eval", world / "sft",
            "--checkpoint.best_metric", "eval/loss", "--checkpoint.keep_last", 1]  # fmt: skip
    check(tmp_path, args, kill_at=7)
    measured = {k: v for k, v in metrics(tmp_path / "whole")[-1].items() if k != "step"}
    assert set(measured) == {f"eval/{name}" for name in EVALUATED["sft"]}
    assert measured["eval/perplexity"] == pytest.approx(math.exp(measured["eval/loss"]))
    assert all(line["train/loss_spike"] == 0 for line in metrics(tmp_path / "whole") if "train/loss" in line)
    for run in ("whole", "broken"):  # on its own data the last one is the best
        best = open_source(str(tmp_path / run / "checkpoints/best"))
        assert best.manifest["eval"]["eval/loss"] == metrics(tmp_path / run)[-1]["eval/loss"]
        assert [p.name for p in (tmp_path / run / "checkpoints").glob("step_*")] == [best.path.name]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole/checkpoints").rglob("*")}
    again = mrlhf(*args, "--train.output_dir", tmp_path / "whole")
    assert "already finished" in again.stdout
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "whole/checkpoints").rglob("*")}


def test_a_deterministic_run_gives_its_numbers_again(world: Path, tmp_path: Path) -> None:
    """On the CPU those of the same run without the option; the other half resumes it, with or without."""
    args = ["sft", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", world / "sft",
            "--train.global_batch_size", 2, "--train.max_steps", 4, "--optim.lr", 1e-3, "--checkpoint.save_interval", 2,
            "--parallel.tensor_model_parallel_size", 2]  # fmt: skip
    runs = [tmp_path / name for name in ("one", "two", "plain")]
    for run, on in zip(runs, ("true", "true", "false"), strict=True):
        mrlhf(*args, "--train.output_dir", run, "--train.deterministic", on, ranks=2)
    assert comparable(runs[0]) == comparable(runs[1]) == comparable(runs[2])
    shutil.rmtree(runs[0] / "checkpoints/step_4")
    (runs[0] / "checkpoints/latest").write_text("step_2\n")
    assert "resumed from" in mrlhf(*args, "--train.output_dir", runs[0], ranks=2).stdout
    assert comparable(runs[0]) == comparable(runs[2])


def test_a_blend_goes_on_with_the_same_rows_on_another_layout(world: Path, tmp_path: Path) -> None:
    """Own text and Megatron-LM's own, three steps on one rank, the rest on two; against all on one rank.
    Then with other data.
    """
    for end in (".bin", ".idx"):
        shutil.copy(world / f"text{end}", tmp_path / f"theirs{end}")
    for file in world.glob("text.*"):
        shutil.copy(file, tmp_path / file.name.replace("text", "ours"))
    shutil.copy(world / "text_loss_mask.bin", tmp_path / "ours_loss_mask.bin")
    shutil.copy(world / "text_loss_mask.idx", tmp_path / "ours_loss_mask.idx")
    blend = f"[{{prefix: {tmp_path / 'ours'}, weight: 0.7}}, {{prefix: {tmp_path / 'theirs'}, weight: 0.3}}]"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = ["pretrain", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", blend,
            "--data.seq_length", 160, "--train.global_batch_size", 4, "--train.max_steps", 6, "--optim.lr", 1e-3,
            "--checkpoint.save_interval", 3]  # fmt: skip
    first = mrlhf(*args, "--train.output_dir", whole)
    assert f"note: {tmp_path / 'theirs'} is Megatron-LM's own data: " in first.stdout
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints/step_6")
    (broken / "checkpoints/latest").write_text("step_3\n")
    again = mrlhf(*args, "--train.output_dir", broken, ranks=2)
    assert "resumed from" in again.stdout
    for one, two in zip(metrics(whole), metrics(broken), strict=True):
        same = {k for k in one if k.startswith("data/")} | {"train/num_tokens", "train/num_rows", "train/epoch"} & set(
            one
        )
        assert {"data/ours/epoch", "data/theirs/epoch", "train/num_tokens"} <= same
        assert {k: one[k] for k in same} == {k: two[k] for k in same}
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
    kept = [json.loads((run / "checkpoints/step_6/mrlhf.json").read_text())["data"] for run in (whole, broken)]
    assert (
        kept[0] == kept[1]
        and sum(s["consumed"] for s in kept[0]) == 24
        and [s["consumed"] for s in kept[0]] in ([17, 7], [16, 8])
    )

    shutil.rmtree(broken / "checkpoints/step_6")
    (broken / "checkpoints/latest").write_text("step_3\n")
    for file in tmp_path.glob("ours*"):
        file.unlink()
    remake(world, tmp_path / "ours")
    refused = mrlhf(*args, "--train.output_dir", broken, check=False)
    assert refused.returncode == 2
    assert (
        f"CheckpointError: {broken / 'checkpoints/step_3'}: the data at {tmp_path / 'ours'} was changed"
        in refused.stderr
    )


def remake(world: Path, prefix: Path) -> None:
    """The world's text in another order."""
    from mrlhf.data.prepare.job import PreprocessConfig, preprocess

    preprocess(
        PreprocessConfig(
            task="pretrain",
            input=(str(world / "text.jsonl"),),
            tokenizer=str(world / "qwen2"),
            output_prefix=str(prefix),
            seq_length=160,
            seed=9,
        )
    )


@dataclass
class Rows:
    """As much of a data set as an order asks for."""

    num_samples: int
    identity: str = "x" * 64
    prefix: str = "data/x"
    task: str = "prompts"


def test_a_position_that_cannot_be_right_is_refused() -> None:
    from mrlhf.config.load import load_config
    from mrlhf.config.options import SFTStage
    from mrlhf.training.batches import data_position, make_order, restore_position

    flags = [
        "--model.path",
        "m",
        "--data.train",
        "x",
        "--train.output_dir",
        "o",
        "--train.global_batch_size",
        "4",
        "--data.packing",
        "false",
    ]
    config, data = load_config(SFTStage, None, flags), Rows(30)
    order = make_order(config, data)
    manifest = {"step": 3, **data_position(order, data, order.consumed(3))}
    assert manifest["data"] == [{"prefix": "data/x", "identity": "x" * 64, "rows": 30, "consumed": 12}]
    resumed = make_order(config, data)
    restore_position(resumed, data, manifest, where="c")
    assert resumed.rows(4) == order.rows(4)
    restore_position(make_order(config, data), data, {"step": 3}, where="c")  # a checkpoint of an earlier version
    with pytest.raises(CheckpointError, match="its data position is wrong"):
        restore_position(make_order(config, data), data, {**manifest, "step": 2}, where="c")
    for other in (Rows(31), Rows(30, identity="y" * 64)):
        with pytest.raises(CheckpointError, match="the data at data/x was changed"):
            restore_position(make_order(config, other), other, manifest, where="c")
        changed = make_order(config, other)
        restore_position(changed, other, manifest, where="c", allowed=("data",))
        assert changed.rows(4) == make_order(config, other).rows(4)


def test_another_tokenizer_is_refused_and_another_batch_goes_on_where_it_stood(world: Path, tmp_path: Path) -> None:
    from conftest import make_tokenizer

    from mrlhf.config.load import load_config
    from mrlhf.config.options import SFTStage
    from mrlhf.data.tokenizers.hf import fingerprint
    from mrlhf.training.batches import data_position, make_order, restore_position

    flags = [
        "--model.path",
        "m",
        "--data.train",
        "x",
        "--train.output_dir",
        "o",
        "--data.packing",
        "false",
        "--train.num_epochs",
        "2",
    ]
    small, large = (
        make_order(load_config(SFTStage, None, [*flags, "--train.global_batch_size", n]), Rows(30)) for n in ("4", "10")
    )
    manifest = {
        "step": 3,
        "tokenizer": fingerprint(world / "qwen2"),
        **data_position(small, Rows(30), small.consumed(3)),
    }
    make_tokenizer(tmp_path, ["quite", "another"])
    with pytest.raises(CheckpointError, match="the tokenizer of .* is not the checkpoint's"):
        restore_position(small, Rows(30), manifest, where="c", hf_dir=tmp_path)
    restore_position(small, Rows(30), manifest, where="c", hf_dir=tmp_path, allowed=("tokenizer",))
    restore_position(large, Rows(30), manifest, where="c", hf_dir=world / "qwen2", allowed=("train.global_batch_size",))
    assert large.total_steps == 3 + 5 and small.total_steps == 15
    rest = [row for step in range(4, 9) for row in large.rows(step)]
    assert rest[:48] == [row for step in range(4, 16) for row in small.rows(step)] and rest[48:] == [-1, -1]
    assert large.consumed(8) == [60]


def test_prompts_of_a_blend() -> None:
    """Whole rollouts, every prompt of every source in its share, numbered through."""
    from mrlhf.config.load import load_config
    from mrlhf.config.options import PPOStage
    from mrlhf.data.blend import Blend
    from mrlhf.rl.rollout.prompts import make_prompt_order

    flags = ["--model.path", "m", "--data.train", "[a, {prefix: b, epochs: 2}]", "--train.output_dir", "o",
             "--train.global_batch_size", "8", "--rollout.batch_size", "8", "--reward.sources", "f.py:f"]  # fmt: skip
    parts = [
        SimpleNamespace(num_samples=n, num_packs=n, num_tokens=n, max_length=1, task="prompts", meta={}, prefix=p)
        for n, p in ((10, "a"), (5, "b"))
    ]
    order = make_prompt_order(load_config(PPOStage, None, flags), Blend(parts))
    prompts = [row for step in range(1, order.total_steps + 1) for row in order.rows(step)]
    assert order.total_steps == 3 and -1 not in prompts and len(prompts) == 24
    assert set(prompts[:20]) == set(range(15)) and sum(p >= 10 for p in prompts[:20]) == 10
