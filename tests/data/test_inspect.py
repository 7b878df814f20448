"""`mrlhf data`: what it prints, and that --check (and for indices the opening) finds every damage and names the
file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrlhf.commands import data as command
from mrlhf.data import show
from mrlhf.data.indexed import FORMAT_VERSION, PackedDataset
from mrlhf.data.prepare.job import PreprocessConfig, preprocess
from mrlhf.data.writer import OutputSet
from mrlhf.errors import DataError, MrlhfError, SeveralErrors

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("pretrain", "sft", "preference", "prompts")


def records(task: str) -> list[dict[str, Any]]:
    if task == "pretrain":
        return [{"text": "books about robots " * (1 + i % 4)} for i in range(9)]
    if task == "sft":
        return [{"input": f"question {i}", "output": "yes " * (1 + i % 5)} for i in range(9)]
    if task == "preference":
        return [
            {"prompt": f"question {i}", "chosen": "yes " * (1 + i % 5), "rejected": "no", "margin": i / 2}
            for i in range(5)
        ]
    return [{"prompt": f"question {i}", "label": {"answer": i}} for i in range(5)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, bpe_dir: str) -> Path:
    """Prefixes pretrain, sft, preference (with margins), prompts (with labels)."""
    root = tmp_path_factory.mktemp("sets")
    for task in KINDS:
        path = root / f"{task}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records(task)))
        config = PreprocessConfig(
            task=task, input=(str(path),), tokenizer=bpe_dir, output_prefix=str(root / task), seq_length=48
        )
        preprocess(config)
    return root


def files(root: Path, task: str) -> list[Path]:
    return sorted(
        p for p in root.glob(f"{task}*") if p.suffix in (".bin", ".idx", ".json") or p.name.endswith("_labels.jsonl")
    )


def problems(prefix: Path) -> list[MrlhfError]:
    return show.check_dataset(str(prefix))


def shown(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert command.main([str(a) for a in args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("task", KINDS)
def test_a_sound_set(task: str, sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, sets / task, "--check")
    assert text.splitlines()[-1] == "nothing wrong was found"
    assert (
        f"{task} data" in text
        and "fill_rate" in text
        and "drops                  none" in text
        and f"{task}.jsonl" in text
    )
    bars = text[text.index("tokens a sample:") :].splitlines()[1:-1]
    counts = [int(line.split()[1].replace(",", "")) for line in bars]
    assert sum(counts) == PackedDataset.open(sets / task).num_samples


@pytest.mark.parametrize("task", KINDS)
def test_every_byte_of_an_index_counts(task: str, sets: Path) -> None:
    """Found by --check, which names the file, and at the opening without a checksum of it."""
    for path in files(sets, task):
        if path.suffix != ".idx":
            continue
        whole = path.read_bytes()
        try:
            for at in range(len(whole)):
                for flip in (0x01, 0x80, 0xFF, 0x03, 0x0C, 0x0B) if at < 40 else (0x01, 0x80)[at % 2 :][:1]:
                    path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
                    with pytest.raises(DataError):
                        PackedDataset.open(sets / task)
                found = problems(sets / task)
                assert [e.where for e in found] == [str(path)], (path.name, at)
        finally:
            path.write_bytes(whole)


@pytest.mark.parametrize("task", KINDS)
def test_every_other_byte_counts(task: str, sets: Path) -> None:
    rng = np.random.default_rng(1)
    for path in files(sets, task):
        if path.suffix == ".idx":
            continue
        whole = path.read_bytes()
        damaged = [
            (at, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            for at, flip in zip(
                rng.integers(0, len(whole), 60).tolist(), rng.integers(1, 256, 60).tolist(), strict=True
            )
        ]
        damaged += [(n, whole[:n]) for n in (0, 1, len(whole) // 2, len(whole) - 1)] + [(-1, whole + b"\n")]
        try:
            for at, text in damaged:
                path.write_bytes(text)
                found = problems(sets / task)
                assert [e.where for e in found] == [str(path)], (path.name, at)
                if path.suffix == ".json":  # small enough to be looked at whole before every run
                    with pytest.raises(DataError, match=path.name):
                        PackedDataset.open(sets / task)
            path.unlink()
            assert [e.where for e in problems(sets / task)] == [str(path)]
        finally:
            path.write_bytes(whole)


def test_all_damaged_files_are_named_at_once(sets: Path) -> None:
    paths = [sets / "sft.bin", sets / "sft_loss_mask.bin"]
    kept = [p.read_bytes() for p in paths]
    for path, data in zip(paths, kept, strict=True):
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    extra = sets / "sft_margin.bin"
    extra.write_bytes(b"1234")
    try:
        with pytest.raises(SeveralErrors) as raised:
            command.main([str(sets / "sft"), "--check"])
        assert [e.where for e in raised.value.errors] == [*map(str, paths), str(extra)]
    finally:
        extra.unlink()
        for path, data in zip(paths, kept, strict=True):
            path.write_bytes(data)


GOOD = {"ids": [5, 6, 7, 8, 9], "mask": [0, 1, 1, 0, 1], "lengths": [3, 2]}
META = {
    "format": FORMAT_VERSION,
    "task": "sft",
    "num_samples": 2,
    "num_packs": 1,
    "num_tokens": 5,
    "num_trained_tokens": 3,
    "packed": True,
    "seq_length": 8,
    "vocab_size": 10,
    "end_token_id": None,
    "tokenizer_fingerprint": "x",
    "tokenizer": "t",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"ids": [5, 6, 7, 8, 10]}, "1 samples with ids outside the vocabulary of 10; the first is sample 1"),
        ({"mask": [1, 1, 1, 0, 1]}, "with a trained first token"),
        ({"mask": [0, 1, 2, 0, 1]}, "with mask values other than 0 and 1"),
        ({"mask": [0, 0, 0, 0, 1]}, "with no trained token; the first is sample 0"),
        ({"mask": [0, 1, 0, 0, 1]}, "with an untrained last token"),
        ({"seq_length": 4}, "1 packs longer than seq_length = 4; the first is pack 0"),
        ({"num_trained_tokens": 4}, "num_trained_tokens is 3"),
        ({"num_tokens": 6}, "num_tokens is 5"),
        ({"end_token_id": 7}, "1 samples with a last token that is not the end token 7; the first is sample 1"),
        (
            {"task": "pretrain", "mask": [0, 0, 1, 0, 1], "num_trained_tokens": 2},
            "with an untrained token behind the first",
        ),
    ],
)
def test_content_that_checksums_agree_with(change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    """What a faulty writer could have sealed."""
    values = GOOD | META | change
    with OutputSet(tmp_path / "d") as output:
        output.indexed("", np.dtype("uint16")).add_documents(
            np.array(values["ids"]), values["lengths"], [len(values["lengths"])]
        )
        output.indexed("_loss_mask", np.dtype("uint8")).add_documents(
            np.array(values["mask"]), values["lengths"], [len(values["lengths"])]
        )
        output.commit({k: values[k] for k in META})
    text = "\n".join(str(e) for e in problems(tmp_path / "d"))
    assert message in text if message else not text


def test_samples_are_marked(
    sets: Path, bpe_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, sets / "sft", "--samples", 3)
    assert text.count("--- sample") == 3 and re.search(r"user\nquestion \d<\|im_end\|>", text)
    assert "<|im_start|>assistant\n[[yes " in text and "<|im_end|>]]" in text
    pairs = shown(capsys, sets / "preference", "--samples", 1)
    assert "--- chosen 0" in pairs and "--- rejected 0" in pairs and ", margin " in pairs and pairs.count("[[") == 2
    prompts = shown(capsys, sets / "prompts", "--samples", 9, "--tokenizer", bpe_dir)
    assert (
        prompts.count("--- sample") == 5
        and 'label {"answer": 4}' in prompts.replace('":4', '": 4')
        and "[[" not in prompts
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(capsys, sets / "sft", "--samples", 1)
    assert "\x1b[1;32myes " in coloured and "[[" not in coloured


def test_the_tokenizer_is_the_datas(sets: Path, unigram_dir: str) -> None:
    with pytest.raises(DataError, match="not the tokenizer that the data was made with"):
        command.main([str(sets / "sft"), "--samples", "1", "--tokenizer", unigram_dir])


def test_data_cannot_steer_the_terminal(load: Callable[[str], Any], bpe_dir: str) -> None:
    tokenizer = load(bpe_dir)
    ids = np.array(tokenizer("a\x1b[2Jb\x07\n")["input_ids"])
    assert show.marked(tokenizer, ids, np.zeros(len(ids), np.uint8), ("[[", "]]")) == "a\\x1b[2Jb\\x07\n"


def test_without_its_tokenizer_ids_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with OutputSet(tmp_path / "d") as output:
        output.indexed("", np.dtype("uint16")).add_documents(
            np.array(GOOD["ids"]), GOOD["lengths"], [len(GOOD["lengths"])]
        )
        output.indexed("_loss_mask", np.dtype("uint8")).add_documents(
            np.array(GOOD["mask"]), GOOD["lengths"], [len(GOOD["lengths"])]
        )
        output.commit({**META, "tokenizer": str(tmp_path / "gone")})
    text = shown(capsys, tmp_path / "d", "--samples", 1)
    assert "note: its tokenizer cannot be loaded" in text and "5 [[6 7 ]]" in text


def test_the_command(sets: Path) -> None:
    """Without torch or Megatron; status 2 where something is wrong."""
    code = (
        "import sys; from mrlhf.cli import main; s = main(sys.argv[1:]); "
        "assert not {'torch', 'megatron'} & set(sys.modules); sys.exit(s)"
    )

    def command(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "data", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=100
        )

    done = command(sets / "sft", "--check")
    assert done.returncode == 0 and "nothing wrong was found" in done.stdout, done.stderr
    shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m mrlhf data {sets / 'sft'} | head -1"]
    cut = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert cut.returncode == 0 and cut.stdout.count("\n") == 1 and cut.stderr == ""
    missing = command(sets / "nothing")
    assert missing.returncode == 2 and "no such dataset" in missing.stderr and "Traceback" not in missing.stderr
