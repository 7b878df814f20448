"""Fixes of data sets that are damaged, missing or of another kind."""

from __future__ import annotations

import ctypes
import json
import shlex
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrlhf.data import indexed, show
from mrlhf.data.indexed import IndexedReader, PackedDataset, seal, sha256_of
from mrlhf.data.megatron_text import MegatronText
from mrlhf.data.pack import pack
from mrlhf.errors import SeveralErrors

from .harness import By, Command, Scenario, call, state
from .rows import GOOD

REMAKE = r"make the data again: python tools/preprocess_data\.py --overwrite \.\.\."


def _a_set(task: str) -> Callable[[SimpleNamespace], Path]:
    """A copy of a set of the world, and of the raw file that it was made from."""

    def make(bench: SimpleNamespace) -> Path:
        name = {"preference": "pref", "pretrain": "text"}.get(task, task)
        for file in bench.world.glob(f"{name}*"):
            shutil.copy(file, bench.tmp)
        return bench.tmp / name

    return make


def _overwrite(task: str) -> By:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        prefix = bench.tmp / {"preference": "pref", "pretrain": "text"}.get(task, task)
        argv = [
            "--task",
            task,
            "--input",
            f"{prefix}.jsonl",
            "--tokenizer",
            str(bench.world / "qwen2"),
            "--output-prefix",
            str(prefix),
            "--seq-length",
            "160",
            "--workers",
            "1",
            "--overwrite",
        ]
        assert bench.load("tools/preprocess_data.py").main(argv) == 0

    return by


def damaged(
    name: str,
    fix: str,
    damage: Callable[[Path], None],
    *,
    task: str = "sft",
    by: By | None = None,
    read: Callable[[str], Any] = PackedDataset.open,
    right: Any = None,
) -> Scenario:
    name_of = {"preference": "pref", "pretrain": "text"}.get(task, task)
    make = call(lambda bench: read(str(bench.tmp / name_of)), lambda bench: damage(_a_set(task)(bench)))
    return Scenario(name, make, fix, by=by or _overwrite(task), right=right)


def at(suffix: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        with open(f"{prefix}{suffix}", "r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def cut(suffix: str, size: int = 40) -> Callable[[Path], None]:
    return lambda prefix: Path(f"{prefix}{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes()[:size])


def gone(suffix: str) -> Callable[[Path], None]:
    return lambda prefix: Path(f"{prefix}{suffix}").unlink()


def meta(change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.json")
        content = json.loads(path.read_text())
        content.pop("seal")
        change(content)
        path.write_bytes(seal(content) if sealed else json.dumps(content).encode())

    return damage


def more_labels(prefix: Path) -> None:
    path = Path(f"{prefix}_labels.jsonl")
    path.write_text(path.read_text() + "1\n")
    entry = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    meta(lambda content: content["files"]["_labels.jsonl"].update(entry))(prefix)


def alone(prefix: Path) -> None:
    """As Megatron-LM writes it."""
    for suffix in (".json", "_loss_mask.bin", "_loss_mask.idx"):
        Path(f"{prefix}{suffix}").unlink()


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda prefix: [damage(prefix) for damage in damages] and None


def copied(*suffixes: str, task: str = "sft") -> By:
    """The file from where it is whole."""

    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        assert fix.startswith("copy it ")
        name = {"preference": "pref", "pretrain": "text"}.get(task, task)
        for suffix in suffixes:
            shutil.copy(f"{bench.world / name}{suffix}", bench.tmp)

    return by


def _megatron(prefix: str) -> MegatronText:
    return MegatronText(prefix, seq_length=32, vocab_size=400)


def _checked(prefix: str) -> None:
    problems = show.check_dataset(prefix)
    if problems:
        raise SeveralErrors(problems)


ANEW = "copy it here, or make the data anew: python tools/preprocess_data.py --output-prefix NEW ..., then NEW here"
RECORDS = "python tools/preprocess_data.py --input .*/sft.json --output-prefix NEW ..., then NEW here"


def _records(prefix: Path) -> None:
    """Raw records as PREFIX.json, and no set."""
    for file in prefix.parent.glob(f"{prefix.name}[._]*"):
        if file.suffix != ".jsonl":
            file.unlink()
    Path(f"{prefix}.json").write_text(json.dumps([GOOD]))


def _one_object(prefix: Path) -> None:
    Path(f"{prefix}.json").write_text(json.dumps({"messages": GOOD["messages"]}))


def _anew(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The printed command with the rest that `...` stands for; nothing that was there changes."""
    bench.before = {file: file.read_bytes() for file in bench.tmp.iterdir()}
    words = shlex.split(
        fix[fix.index("python") :].partition(" ..., then NEW here")[0].replace("NEW", f"{bench.tmp}/new")
    )
    assert words[:2] == ["python", "tools/preprocess_data.py"]
    rest = ["--task", "sft", "--tokenizer", f"{bench.world}/qwen2", "--seq-length", "160", "--workers", "1"]
    rest += [] if "--input" in words else ["--input", f"{bench.tmp}/sft.jsonl"]
    assert bench.load(words[1]).main([*words[2:], *rest]) == 0
    command.run = lambda command: PackedDataset.open(f"{bench.tmp}/new")


def _untouched(bench: SimpleNamespace) -> None:
    assert all(file.read_bytes() == content for file, content in bench.before.items())


def _map(room: int) -> None:
    """`room`: bytes of address space that are left."""
    with pytest.MonkeyPatch.context() as patch:
        if not room:
            patch.setattr(indexed, "_libc", SimpleNamespace(mmap=lambda *_: ctypes.c_void_p(-1).value))
        indexed._mapped(__file__)


AGAIN, HERE = f"copy it again, or {REMAKE}", f"copy it here, or {REMAKE}"
SCENARIOS = [
    damaged("set without its index", HERE, gone(".idx")),
    damaged("set without its index, copied", HERE, gone(".idx"), by=copied(".idx")),
    damaged("set cut short", AGAIN, cut(".bin"), by=copied(".bin")),
    damaged(
        "set with a flipped byte",
        AGAIN,
        at(".bin", 9, b"\xff"),
        read=lambda p: PackedDataset.open(p, verify=True),
        by=copied(".bin"),
    ),
    damaged("index of another kind", REMAKE, at(".idx", 0, b"x")),
    damaged("index of another version", REMAKE, at(".idx", 9, b"\7")),
    damaged("index of other counts", REMAKE, at(".idx", 18, b"\1\0\0\0")),
    damaged(
        "index of nothing",
        REMAKE,
        lambda prefix: at(".idx", 18, struct.pack("<QQ", 0, (Path(f"{prefix}.idx").stat().st_size - 34) // 8))(prefix),
    ),
    damaged("index that contradicts itself", REMAKE, at(".idx", 34, b"\0\0\0\1")),
    damaged(
        "Megatron's text without its index",
        HERE,
        both(alone, gone(".idx")),
        task="pretrain",
        by=copied(".idx", task="pretrain"),
        read=IndexedReader,
    ),
    damaged(
        "Megatron's text cut short",
        AGAIN,
        both(alone, cut(".bin")),
        task="pretrain",
        by=copied(".bin", task="pretrain"),
        read=_megatron,
    ),
    damaged(
        "text of another tokenizer",
        "data made with the model's tokenizer",
        alone,
        task="pretrain",
        read=lambda prefix: MegatronText(
            prefix, seq_length=32, vocab_size=400 if Path(prefix + ".json").is_file() else 5
        ),
    ),
    damaged("counts that differ", REMAKE, meta(lambda m: m.update(num_samples=m["num_samples"] + 1))),
    damaged("labels that differ", REMAKE, more_labels, task="prompts", read=lambda p: PackedDataset.open(p).label(0)),
    damaged("no metadata", ANEW, gone(".json"), by=copied(".json")),
    damaged("no metadata, anew", ANEW, gone(".json"), by=_anew, right=lambda bench, data: _untouched(bench)),
    damaged("records beside the prefix", RECORDS, _records, by=_anew, right=lambda bench, data: _untouched(bench)),
    damaged("records of an object", RECORDS, both(_records, _one_object), by=_anew),
    damaged("metadata of wrong types", REMAKE, meta(lambda m: m.update(num_packs=-1))),
    damaged(
        "labels that are no JSON",
        AGAIN,
        at("_labels.jsonl", 0, b"x"),
        task="prompts",
        by=copied("_labels.jsonl", task="prompts"),
        read=lambda p: PackedDataset.open(p).label(0),
    ),
    state(_map, 0, "sysctl .*; a higher ulimit -v", 1 << 30, "address space that is used up"),
    damaged("metadata that is no JSON", REMAKE, cut(".json")),
    damaged("metadata of something else", REMAKE, lambda prefix: Path(f"{prefix}.json").write_text("{}")),
    damaged("metadata of another format", REMAKE, meta(lambda m: m.update(format=99))),
    damaged("metadata without its checksum", REMAKE, meta(lambda m: None, sealed=False)),
    damaged(
        "metadata that was edited",
        AGAIN,
        lambda prefix: Path(f"{prefix}.json").write_text(Path(f"{prefix}.json").read_text().replace('"sft"', '"dpo"')),
        by=copied(".json"),
    ),
    damaged(
        "a file that is not the set's",
        "move it to another directory",
        lambda prefix: Path(f"{prefix}_margin.bin").write_text("x"),
        read=_checked,
        by=lambda bench, command, fix: (bench.tmp / "sft_margin.bin").rename(bench.root / "sft_margin.bin"),
    ),
    Scenario(
        "no such set",
        call(lambda bench: PackedDataset.open(str(bench.now)), lambda bench: setattr(bench, "now", bench.tmp / "none")),
        "--output-prefix of that command",
        by=lambda bench, command, fix: setattr(bench, "now", bench.world / "sft"),
    ),
    Scenario(
        "a file for the prefix",
        call(
            lambda bench: PackedDataset.open(str(bench.now)),
            lambda bench: setattr(bench, "now", f"{bench.world}/sft.bin"),
        ),
        "leave out .bin",
        by=lambda bench, command, fix: setattr(bench, "now", bench.now.removesuffix(fix.split()[-1])),
    ),
    state(
        lambda size: pack([5], capacity=size), 4, "a larger --seq-length, or --truncate drop", 5, "pack that is small"
    ),
]
