"""Fixes of tools/preprocess_data.py that speak of its input and output, and of a command that was interrupted."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mrlhf.data.prepare import job as preprocessing
from mrlhf.data.prepare.options import PreprocessConfig

from .harness import Command, Scenario
from .rows import CHAT, GOOD, A, U, gives, made, prepare, setting, then, without, write


def _line(number: int, text: str | None) -> Callable[[SimpleNamespace, Command, str], None]:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        file = bench.tmp / "rows.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        lines[number - 1 : number] = [] if text is None else [text + "\n"]
        file.write_text("".join(lines))

    return by


LINE = json.dumps(GOOD)


def _interrupted(bench: SimpleNamespace, **changes: Any) -> None:
    """The state that a killed command leaves: its work directory with one shard."""
    from mrlhf.data.prepare import workers

    plain = workers.write_shard

    def stop(*args: Any) -> None:
        plain(*args)
        raise KeyboardInterrupt

    workers.write_shard = stop
    try:
        command = prepare("sft", [GOOD], **changes)(bench)
        command.run(command)
    except KeyboardInterrupt:
        pass
    finally:
        workers.write_shard = plain


def after_interruption(command: Callable[[SimpleNamespace], Command], **changes: Any) -> Callable[[Any], Command]:
    def make(bench: SimpleNamespace) -> Command:
        _interrupted(bench, **changes)
        return command(bench)

    return make


def _run_once(command: Callable[[SimpleNamespace], Command]) -> Callable[[SimpleNamespace], Command]:
    def make(bench: SimpleNamespace) -> Command:
        first = command(bench)
        first.run(first)
        return command(bench)

    return make


def _another_process(bench: SimpleNamespace) -> Command:
    import fcntl

    folder = bench.tmp / ".out.work"
    folder.mkdir()
    bench.lock = open(folder / "lock", "ab")  # noqa: SIM115  held until the end of the scenario
    fcntl.flock(bench.lock, fcntl.LOCK_EX)
    return prepare("sft", [GOOD])(bench)


def _wait(bench: SimpleNamespace, command: Command, fix: str) -> None:
    bench.lock.close()


def _full_disk(bench: SimpleNamespace) -> Command:
    import errno

    command = prepare("sft", [GOOD])(bench)
    whole, state = command.run, {"full": True}

    def run(command: Command) -> Any:
        plain = preprocessing._assemble

        def full(*args: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        preprocessing._assemble = full if state["full"] else plain
        try:
            return whole(command)
        finally:
            preprocessing._assemble = plain

    command.run = run
    bench.disk = state
    return command


def _make_room(bench: SimpleNamespace, command: Command, fix: str) -> None:
    assert fix.endswith("then the same command with --resume")
    bench.disk["full"] = False
    command.set("--resume")


def _changing(bench: SimpleNamespace) -> Command:
    """The input grows while it is read, the first time."""
    command = prepare("sft", [GOOD])(bench)
    whole, state = command.run, {"first": True}

    def run(command: Command) -> Any:
        plain = preprocessing._assemble
        if state.pop("first", False):
            sources = preprocessing.Sources.provenance

            def changed(self: Any) -> Any:
                os.utime(bench.tmp / "rows.jsonl", ns=(1, 1))
                return sources(self)

            preprocessing.Sources.provenance = changed
            try:
                return whole(command)
            finally:
                preprocessing.Sources.provenance = sources
        preprocessing._assemble = plain
        return whole(command)

    command.run = run
    return command


def _parquet(bench: SimpleNamespace) -> Command:
    """`datasets` and pyarrow are not there the first time."""
    import sys

    command = prepare("sft", None, input=lambda bench: _saved(bench))(bench)
    whole, state = command.run, {"first": True}

    def run(command: Command) -> Any:
        if not state.pop("first", False):
            return whole(command)
        kept = sys.modules.get("datasets")
        sys.modules["datasets"] = None  # type: ignore[assignment]
        try:
            return whole(command)
        finally:
            del sys.modules["datasets"]
            if kept is not None:
                sys.modules["datasets"] = kept

    command.run = run
    return command


def _installed(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The package stands in the extra that the fix names."""
    assert "datasets" in (Path(__file__).parents[2] / "requirements/data.txt").read_text()


def _saved(bench: SimpleNamespace, *splits: str) -> str:
    import datasets

    table = datasets.Dataset.from_list([GOOD])
    folder = str(bench.tmp / "saved")
    (datasets.DatasetDict({split: table for split in splits}) if splits else table).save_to_disk(folder)
    return folder


def _to_lines(bench: SimpleNamespace, command: Command, fix: str) -> None:
    command.set("--input", str(write("lines.jsonl", LINE + "\n")(bench)))


def _kept(name: str, content: str, make: Callable[[SimpleNamespace], Command]) -> Callable[[SimpleNamespace], Command]:
    """The command, where a file of the user's stands already."""

    def with_file(bench: SimpleNamespace) -> Command:
        write(name, content)(bench)
        return make(bench)

    return with_file


def _given(name: str) -> Callable[[SimpleNamespace], Path]:
    """The user's file itself where it holds rows, else another."""

    def choose(bench: SimpleNamespace) -> Path:
        return bench.tmp / (name if (bench.tmp / name).stat().st_size else "rows.jsonl")

    return choose


def _unchanged(name: str) -> Callable[[Any, Any], None]:
    def right(bench: SimpleNamespace, result: Any) -> None:
        assert result == [CHAT("blue")], result
        assert b"format" not in (bench.tmp / name).read_bytes()

    return right


SCENARIOS = [
    *(
        Scenario(
            name,
            prepare("sft", f"{LINE}\n{wrong}\n"),
            "mend or remove the line",
            by=_line(2, better),
            right=gives(*[CHAT("blue")] * (1 + (better is not None))),
        )
        for name, wrong, better in (
            ("no JSON", '{"messages": ', None),
            ("column twice", LINE[:-1] + ', "messages": []}', LINE),
        )
    ),
    Scenario(
        "no such file", prepare("sft", None), "check the path given to --input", by=_to_lines, right=gives(CHAT("blue"))
    ),
    Scenario(
        "pattern without a file",
        prepare("sft", [GOOD], input=lambda bench: bench.tmp / "*.json"),
        r"check the pattern given to --input \(.*\)",
        by=lambda bench, command, fix: command.set("--input", str(bench.tmp / "*.jsonl")),
        right=gives(CHAT("blue")),
    ),
    Scenario("empty file", prepare("sft", ""), "leave it out of --input", by=_to_lines, right=gives(CHAT("blue"))),
    Scenario(
        "files further down",
        prepare(
            "sft", None, input=lambda bench: write("d/e/x.jsonl.gz", gzip.compress(LINE.encode()))(bench).parents[1]
        ),
        r"--input '?/.*/d/\*\*/\*\.jsonl\.gz'?",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "directory of other files",
        prepare("sft", None, input=lambda bench: write("d/x.txt", LINE)(bench).parent),
        "--input FILE",
        by=_to_lines,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no such hub id",
        prepare("sft", None, input="no-such/thing"),
        "--input FILE",
        by=_to_lines,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "several splits",
        prepare("sft", None, input=lambda bench: _saved(bench, "test", "train")),
        "--input .*/saved:train",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "misspelt split",
        prepare("sft", None, input=lambda bench: _saved(bench, "train", "validation") + ":valid"),
        "--input .*/saved:validation",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "other split",
        prepare("sft", None, input=lambda bench: _saved(bench, "train", "test") + ":dev"),
        "--input .*/saved:SPLIT",
        by=lambda bench, command, fix: command.set("--input", fix.split()[1].replace("SPLIT", "test")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "package for a data set", _parquet, r"pip install 'mrlhf\[data\]'", by=_installed, right=gives(CHAT("blue"))
    ),
    Scenario(
        "made data as input",
        prepare("sft", None, input=lambda bench: bench.world / "sft", seq_length=160),
        "--input .*/sft.jsonl",
    ),
    Scenario(
        "a file of made data as input",
        prepare("sft", None, input=lambda bench: bench.world / "sft.bin", seq_length=160),
        "--input .*/sft.jsonl",
    ),
    Scenario(
        "no array",
        prepare("sft", None, input=write("a.json", "[" + LINE + "} ")),
        "one JSON object a line",
        by=_to_lines,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no input",
        lambda bench: _no_input(bench),
        "--input FILE",
        by=lambda bench, command, fix: _give(bench, command),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "output exists",
        _run_once(prepare("sft", [GOOD])),
        "another --output-prefix, or --overwrite",
        take="--overwrite",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "output exists, another",
        _run_once(prepare("sft", [GOOD])),
        "another --output-prefix, or --overwrite",
        by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "output exists for --resume",
        lambda bench: (
            _run_once(prepare("sft", [GOOD]))(bench) and prepare("sft", [GOOD], seq_length=99, resume="")(bench)
        ),
        "another --output-prefix, or --overwrite",
        take="--overwrite",
        right=gives(CHAT("blue")),
    ),
    *(
        Scenario(
            f"{name} in the output's place{', overwrite' * bool(changes)}",
            _kept(name, content, prepare("sft", [GOOD], input=_given(name), **changes)),
            "another --output-prefix",
            by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
            right=_unchanged(name),
        )
        for name, content in (
            ("out.json", json.dumps([GOOD])),
            ("out_labels.jsonl", LINE + "\n"),
            ("out_margin.bin", ""),
        )
        for changes in ({}, {"overwrite": ""})
    ),
    Scenario(
        "input among a set's files",
        _kept("out.idx", "", prepare("sft", [GOOD], input=write("out.json", json.dumps([GOOD])), overwrite="")),
        "another --output-prefix",
        by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
        right=_unchanged("out.json"),
    ),
    Scenario(
        "Megatron's text in the output's place",
        _kept("out.bin", "x", _kept("out.idx", "x", prepare("sft", [GOOD]))),
        "another --output-prefix, or --overwrite if a command of this tool left them unfinished",
        by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
        right=_unchanged("out.bin"),
    ),
    *(
        Scenario(
            f"interrupted, {flag}",
            after_interruption(prepare("sft", [GOOD])),
            "--resume to continue it, or --overwrite to start again",
            take=flag,
            right=gives(CHAT("blue")),
        )
        for flag in ("--resume", "--overwrite")
    ),
    Scenario(
        "interrupted with other options",
        after_interruption(prepare("sft", [GOOD], resume=""), seq_length=80),
        "the same command with --resume, or --overwrite without it to start again",
        by=setting("--seq-length", "80"),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "interrupted with other options, again",
        after_interruption(prepare("sft", [GOOD], resume=""), seq_length=80),
        "the same command with --resume, or --overwrite without it to start again",
        by=then(without("--resume"), setting("--overwrite")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "two at once",
        _another_process,
        "wait until it ends, or another --output-prefix",
        by=_wait,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "two at once, another",
        _another_process,
        "wait until it ends, or another --output-prefix",
        by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "full disk",
        _full_disk,
        "make room, then the same command with --resume",
        by=_make_room,
        right=gives(CHAT("blue")),
    ),
    Scenario("input that changes", _changing, "the same command again", by=lambda *_: None, right=gives(CHAT("blue"))),
    Scenario(
        "empty split",
        prepare("sft", [GOOD], split="0.5,0.5"),
        "a larger fraction, or more data",
        by=lambda bench, command, fix: (bench.tmp / "rows.jsonl").write_text(
            "".join(json.dumps({"messages": [{**U, "content": f"red {i}"}, A]}) + "\n" for i in range(20))
        ),
    ),
]


def _no_input(bench: SimpleNamespace) -> Command:
    """From Python; the command line demands the flag."""
    values = dict(
        task="sft", tokenizer=str(bench.world / "qwen2"), output_prefix=str(bench.tmp / "out"), seq_length=64, workers=1
    )

    def run(command: Command) -> Any:
        preprocessing.preprocess(PreprocessConfig(**values, input=tuple(command.flags[1:])))
        return made(str(bench.tmp / "out"))

    return Command(run)


def _give(bench: SimpleNamespace, command: Command) -> None:
    command.set("--input", str(write("rows.jsonl", LINE + "\n")(bench)))
