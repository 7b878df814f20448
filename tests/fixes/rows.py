"""Scenarios of tools/preprocess_data.py: its command on a file of rows; the data made is decoded and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mrlhf.data.indexed import PackedDataset
from mrlhf.data.prepare import job as preprocessing
from mrlhf.data.prepare.options import PreprocessConfig
from mrlhf.data.show import marked
from mrlhf.data.tokenizers.vocabulary import load_tokenizer

from .harness import Command, Scenario

U, A, B = (
    {"role": role, "content": text} for role, text in (("user", "red"), ("assistant", "blue"), ("assistant", "green"))
)
CHAT = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n[[{}<|im_end|>]]".format
ASK = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
GOOD = {"messages": [U, A]}
SHAREGPT = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "blue"}]


def made(prefix: str) -> list[str]:
    """The samples of a data set in its order, the trained part in brackets."""
    data = PackedDataset.open(prefix, verify=True)
    tokenizer = load_tokenizer(data.meta["tokenizer"])
    return sorted(marked(tokenizer, *data.sample(i)[1:]) for i in range(data.num_samples))


def prepare(task: str, rows: list[Any] | str | None, **changes: Any) -> Callable[[SimpleNamespace], Command]:
    """The command on a file of these rows; `changes` of its flags: a function of the bench, or a text ("" for none)."""

    def run(command: Command) -> Any:
        script = sys_script()
        values = vars(script.parser().parse_args(command.flags))
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if values["input_template"] is not None:
            values["input_template"] = script.plain_template(values["input_template"])
        prefixes = preprocessing.preprocess(PreprocessConfig(**values))
        return [text for prefix in prefixes for text in made(prefix)]

    def make(bench: SimpleNamespace) -> Command:
        file = bench.tmp / "rows.jsonl"
        if rows is not None:
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            file.write_text(text)
        values = {
            "task": task,
            "input": file,
            "tokenizer": bench.world / "qwen2",
            "output_prefix": bench.tmp / "out",
            "seq_length": 64,
            "workers": 1,
            "tokenizer_backend": "hf",
        } | changes
        flags = []
        for name, value in values.items():
            value = value(bench) if callable(value) else value
            flags += [f"--{name.replace('_', '-')}", *([str(value)] if value != "" else [])]
        return Command(run, flags)

    return make


def sys_script() -> Any:
    from test_fixes import Bench

    return Bench.load("tools/preprocess_data.py")


def gives(*samples: str) -> Callable[[Any, Any], None]:
    def right(bench: SimpleNamespace, result: Any) -> None:
        assert result == sorted(samples), result

    return right


def rows_to(change: Callable[[Any], Any]) -> Callable[[SimpleNamespace, Command, str], None]:
    """Changes every row of the file; None removes it."""

    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        file = bench.tmp / "rows.jsonl"
        rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))

    return by


def then(*steps: Callable[[SimpleNamespace, Command, str], None]) -> Callable[[SimpleNamespace, Command, str], None]:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        for step in steps:
            step(bench, command, fix)

    return by


def setting(*flag: str) -> Callable[[SimpleNamespace, Command, str], None]:
    return lambda bench, command, fix: command.set(*flag)


def without(flag: str) -> Callable[[SimpleNamespace, Command, str], None]:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        command.set(flag)
        command.flags.remove(flag)

    return by


def row(
    name: str,
    task: str,
    record: Any,
    fix: str,
    *samples: str,
    take: str | None = None,
    fill: tuple[Any, ...] = (),
    by: Any = None,
    next: str | None = None,
    **changes: Any,
) -> Scenario:
    """One wrong row, given twice."""
    right = gives(*(s for s in samples for _ in range(2))) if samples else None
    return Scenario(
        name, prepare(task, [record] * 2, **changes), fix, take=take, fill=fill, by=by, next=next, right=right
    )


def write(name: str, content: str | bytes) -> Callable[[SimpleNamespace], Path]:
    def make(bench: SimpleNamespace) -> Path:
        path = bench.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make
