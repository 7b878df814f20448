"""Fixes of tokenizers that are damaged, missing or of another kind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrlhf.data.tokenizers import encoder
from mrlhf.data.tokenizers.vocabulary import load_tokenizer

from .harness import By, Command, Scenario, call, state
from .rows import GOOD, prepare


def tokenizer_at(
    name: str, path: Callable[[SimpleNamespace], Any], fix: str, *, take: str | None = None, by: By | None = None
) -> Scenario:
    """A --tokenizer that cannot be used; the fix is another one."""
    make = prepare("sft", [GOOD], tokenizer=path)
    if by is None:
        return Scenario(name, make, fix, take=take or fix, fill=(_World(),))
    return Scenario(name, make, fix, by=by)


class _World:
    """Stands for the world's tokenizer, whose directory scenarios know when they run."""

    def __str__(self) -> str:
        return _World.path

    path = ""


def _put(name: str, content: str | bytes, folder: str = "t") -> Callable[[SimpleNamespace], Path]:
    def make(bench: SimpleNamespace) -> Path:
        _World.path = str(bench.world / "qwen2")
        path = bench.tmp / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def _sentencepiece(kind: str) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = ["red green blue one two three", "user assistant that is it"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def _guessed(bench: SimpleNamespace) -> Path:
    _put("tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))(bench)
    return _put("tokenizer.model", _sentencepiece("bpe"))(bench).parent


def _copy_tokenizer(bench: SimpleNamespace, command: Command, fix: str) -> None:
    for file in (bench.world / "qwen2").iterdir():
        shutil.copy(file, bench.tmp / "t")


def _plain_too(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The bare model, which has no chat template."""
    flag, path = fix.split(", the bare model")[0].split()
    command.set(flag, path)
    command.set("--input-template", "{} ")


def _without(module: str) -> Callable[[Callable[[SimpleNamespace], Command]], Callable[[SimpleNamespace], Command]]:
    """The command on a machine where the package is missing, until `bench.installed`."""

    def wrap(make: Callable[[SimpleNamespace], Command]) -> Callable[[SimpleNamespace], Command]:
        def made(bench: SimpleNamespace) -> Command:
            command, bench.installed = make(bench), False
            whole = command.run

            def run(command: Command) -> Any:
                with pytest.MonkeyPatch.context() as patch:
                    if not bench.installed:
                        patch.setitem(sys.modules, module, None)
                    return whole(command)

            command.run = run
            return command

        return made

    return wrap


def _install(package: str, file: str) -> By:
    """The package stands in the requirements that the fix installs."""

    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        assert package in (Path(__file__).parents[2] / f"requirements/{file}.txt").read_text()
        bench.installed = True

    return by


def _unfit(bench: SimpleNamespace) -> Command:
    """gigatoken is there and gives no offsets."""
    command = prepare("sft", [GOOD], tokenizer_backend="gigatoken")(bench)
    whole = command.run

    def run(command: Command) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder.Encoder, "byte_lengths", lambda self, **_: None)
            return whole(command)

    command.run = run
    return command


def _failing(text: str) -> Any:
    return encoder.GigatokenBackend._call(lambda: {"fine": 1}[text])


def _words(bench: SimpleNamespace) -> None:
    """A tokenizer of whole words beside a config.json of another type."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"red": 0, "blue": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(bench.tmp)
    (bench.tmp / "config.json").write_text('{"model_type": "qwen2"}')
    bench.now = bench.tmp


def _its_files_alone(bench: SimpleNamespace, command: Command, fix: str) -> None:
    bench.now = bench.tmp / "alone"
    bench.now.mkdir()
    for file in bench.tmp.glob("*tokenizer*"):
        shutil.copy(file, bench.now)


def _right_ids(bench: SimpleNamespace, loaded: Any) -> None:
    assert loaded("blue red")["input_ids"] == [1, 0]


def _with_pipe(bench: SimpleNamespace) -> Path:
    shutil.copytree(bench.world / "qwen2", bench.tmp / "t")
    os.mkfifo(bench.tmp / "t/pipe.json")
    return bench.tmp / "t"


REBUILT = "the model's own tokenizer files, or a directory of the tokenizer's files alone"
SCENARIOS = [
    Scenario(
        "words of another model",
        call(lambda bench: load_tokenizer(bench.now), _words),
        REBUILT,
        by=_its_files_alone,
        right=_right_ids,
    ),
    Scenario(
        "pipe among a tokenizer's files",
        prepare("sft", [GOOD], tokenizer=_with_pipe),
        "remove it",
        by=lambda bench, command, fix: (bench.tmp / "t/pipe.json").unlink(),
    ),
    Scenario(
        "words of another model, its own",
        call(lambda bench: load_tokenizer(bench.now), _words),
        REBUILT,
        by=lambda bench, command, fix: setattr(bench, "now", bench.world / "qwen2"),
    ),
    tokenizer_at("no such tokenizer", lambda bench: _put("x", "")(bench).parent / "none", "--tokenizer DIR"),
    tokenizer_at(
        "empty tokenizer",
        lambda bench: _put("x.txt", "")(bench).parent,
        "copy the model's tokenizer there",
        by=_copy_tokenizer,
    ),
    tokenizer_at("broken tokenizer", lambda bench: _put("tokenizer.json", "{}")(bench).parent, "--tokenizer DIR"),
    tokenizer_at("file that is no tokenizer", _put("a.txt", "text"), "--tokenizer DIR"),
    tokenizer_at("model that is none", _put("a.model", b"\1\2"), "--tokenizer DIR"),
    tokenizer_at("model of words", lambda bench: _put("a.model", _sentencepiece("word"))(bench), "--tokenizer DIR"),
    tokenizer_at(
        "guessed model", _guessed, "--tokenizer .*, the bare model, or add the tokenizer_class", by=_plain_too
    ),
    tokenizer_at(
        "unknown ranks",
        _put("a.tiktoken", "YQ== 0\n"),
        r"transformers.integrations.tiktoken"
        r".convert_tiktoken_to_fast\(ENCODING, DIR\), then --tokenizer DIR",
        take="--tokenizer DIR",
    ),
    Scenario(
        "sentencepiece missing",
        _without("sentencepiece")(
            prepare(
                "sft",
                [{"input": "red", "output": "blue"}],
                tokenizer=lambda bench: _put("a.model", _sentencepiece("bpe"))(bench),
                input_template="{} ",
            )
        ),
        "pip install sentencepiece protobuf",
        by=_install("sentencepiece", "base"),
    ),
    Scenario(
        "gigatoken missing",
        _without("gigatoken")(prepare("sft", [GOOD], tokenizer_backend="gigatoken")),
        r"pip install 'mrlhf\[data\]', or --tokenizer-backend hf",
        take="--tokenizer-backend hf",
    ),
    Scenario(
        "gigatoken missing, installed",
        _without("gigatoken")(prepare("sft", [GOOD], tokenizer_backend="gigatoken")),
        r"pip install 'mrlhf\[data\]', or --tokenizer-backend hf",
        by=_install("gigatoken", "data"),
    ),
    Scenario("gigatoken unfit", _unfit, "--tokenizer-backend hf"),
    state(_failing, "x", "--tokenizer-backend hf", "fine", "gigatoken fails"),
    state(encoder._size, "\ud800", "mend or remove the row", "a", "half a character"),
    Scenario(
        "slow tokenizer",
        call(
            lambda bench: __import__("mrlhf.data.prepare.template", fromlist=["Template"]).Template(bench.now),
            lambda bench: setattr(bench, "now", SimpleNamespace(is_fast=False, name_or_path="x")),
        ),
        r"convert it: AutoTokenizer.from_pretrained\(DIR\).save_pretrained\(NEW\) with a recent transformers",
        by=lambda bench, command, fix: setattr(bench, "now", load_tokenizer(bench.world / "qwen2")),
    ),
]
