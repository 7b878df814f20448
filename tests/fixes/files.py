"""Fixes of files that are damaged, missing or of another kind: made data, tokenizers, models, checkpoints."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mrlhf.checkpoint import manifest
from mrlhf.data import show
from mrlhf.data.indexed import IndexedReader, PackedDataset, seal, sha256_of
from mrlhf.data.megatron_text import MegatronText
from mrlhf.data.pack import pack
from mrlhf.data.tokenizers import encoder
from mrlhf.data.tokenizers.vocabulary import load_tokenizer
from mrlhf.errors import SeveralErrors

from .harness import Command, Scenario
from .rows import GOOD, prepare

By = Callable[[SimpleNamespace, Command, str], None]


def call(
    function: Callable[..., Any], prepared: Callable[[SimpleNamespace], Any] | None = None
) -> Callable[[SimpleNamespace], Command]:
    """A call with the bench; `prepared` runs once before it."""

    def make(bench: SimpleNamespace) -> Command:
        if prepared is not None:
            prepared(bench)
        return Command(lambda command: function(bench))

    return make


def state(function: Callable[[Any], Any], wrong: Any, fix: str, right: Any, name: str, **more: Any) -> Scenario:
    """A call with one argument, which is wrong at first."""

    def make(bench: SimpleNamespace) -> Command:
        bench.value_now = wrong
        return Command(lambda command: function(bench.value_now))

    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        bench.value_now = right

    return Scenario(name, make, fix, by=by, **more)


# ---------------------------------------------------------------- data sets

REMAKE = "make the data again with tools/preprocess_data.py --overwrite"


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


AGAIN, HERE = f"copy it again, or {REMAKE}", f"copy it here, or {REMAKE}"
SETS = [
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
    damaged("no metadata", REMAKE, gone(".json")),
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
        "remove it",
        lambda prefix: Path(f"{prefix}_margin.bin").write_text("x"),
        read=_checked,
        by=lambda bench, command, fix: (bench.tmp / "sft_margin.bin").unlink(),
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


# ---------------------------------------------------------------- tokenizers


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


TOKENIZERS = [
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


# ---------------------------------------------------------------- models


def _model(bench: SimpleNamespace) -> Path:
    shutil.copytree(bench.world / "qwen2", bench.tmp / "m")
    return bench.tmp / "m"


def _read_model(bench: SimpleNamespace) -> None:
    from mrlhf.models.families import spec_from_hf
    from mrlhf.models.hf_files import HFReader

    folder = bench.tmp / "m"
    spec = spec_from_hf(json.loads((folder / "config.json").read_text()))
    reader = HFReader(folder, spec, head="lm")
    if bench.later is not None:
        bench.later(folder)
        bench.later = None
    for name, tensor in reader.tensors.items():
        reader._check_finite(name, reader._rows(name, 0, tensor.stored_shape[0]))


def _whole_again(bench: SimpleNamespace, command: Command, fix: str) -> None:
    shutil.rmtree(bench.tmp / "m")
    _model(bench)


def model(
    name: str,
    damage: Callable[[Path], Any] | None,
    *,
    fix: str = "copy or download the file again",
    by: By = _whole_again,
    later: Callable[[Path], Any] | None = None,
) -> Scenario:
    def prepared(bench: SimpleNamespace) -> None:
        folder, bench.later = _model(bench), later
        if damage is not None:
            damage(folder)

    return Scenario(name, call(_read_model, prepared), fix, by=by)


WEIGHTS = "model.safetensors"


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def _entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _overlap(header: dict[str, Any]) -> None:
    one, other = sorted((e for e in _entries(header) if e["shape"] == [128]), key=lambda e: e["data_offsets"])[:2]
    other["data_offsets"] = one["data_offsets"]


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        names = [n for n in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if n != "__metadata__"]
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
        change(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def _not_finite(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (folder / WEIGHTS).write_bytes(data)


def _as_safetensors(bench: SimpleNamespace, command: Command, fix: str) -> None:
    import transformers

    torch.save({}, bench.tmp / "m" / "pytorch_model.bin")
    made = transformers.AutoModelForCausalLM.from_pretrained(bench.world / "qwen2")
    made.save_pretrained(bench.tmp / "m", safe_serialization=True)


def _set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def _spec(config: dict[str, Any]) -> Any:
    from mrlhf.models.families import spec_from_hf

    return spec_from_hf(config)


def _deepseek(**changes: Any) -> dict[str, Any]:
    from conftest import FAMILIES

    config = dict(
        model_type="deepseek_v3",
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    return {**config, **FAMILIES["deepseek_v3"][1], **changes}


MODELS = [
    model("weights of another kind", lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99)),
    model(
        "weights with a header that is no JSON",
        lambda folder: (folder / WEIGHTS).write_bytes((3).to_bytes(8, "little") + b"abc"),
    ),
    model("weights with a wrong entry", _header(lambda header: _entries(header)[0].update(shape=[1]))),
    model("weights cut short", lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])),
    model("weights that overlap", _header(_overlap)),
    model("weights that are not finite", _not_finite),
    model(
        "weights cut while they are read",
        None,
        later=lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:9000]),
    ),
    model(
        "no weights",
        lambda folder: (folder / WEIGHTS).unlink(),
        fix="save the model with safetensors",
        by=_as_safetensors,
    ),
    model("index of something else", _index(lambda index: index.pop("weight_map"))),
    model("index of a shard that is missing", _index(lambda index: index["weight_map"].update(x="b.safetensors"))),
    model("index of a tensor that is missing", _index(lambda index: index["weight_map"].update(x="a.safetensors"))),
    model(
        "unknown field",
        _set_config(warp=3),
        fix="remove them from config.json if they change nothing",
        by=lambda bench, command, fix: _set_config(warp=None)(bench.tmp / "m"),
    ),
    Scenario(
        "layers for further tokens",
        call(
            lambda bench: _spec(bench.now), lambda bench: setattr(bench, "now", _deepseek(num_nextn_predict_layers=1))
        ),
        "to leave them out, set it to 0 and remove .*",
        by=lambda bench, command, fix: bench.now.update(num_nextn_predict_layers=0),
    ),
]


# ---------------------------------------------------------------- checkpoints and conversions


def _checkpoint(bench: SimpleNamespace) -> Path:
    folder = bench.tmp / "c"
    folder.mkdir()
    (folder / "a").write_text("content")
    content = {"stage": "sft", "step": 1, "head": "lm", "dtype": "float32", "resumable": True}
    manifest.write_manifest(folder, content)
    shutil.copytree(folder, bench.tmp / "copy")
    return folder


def checkpoint(name: str, damage: Callable[[Path], Any]) -> Scenario:
    make = call(
        lambda bench: manifest.check_manifest(bench.tmp / "c", verify="hash"), lambda bench: damage(_checkpoint(bench))
    )

    def copy(bench: SimpleNamespace, command: Command, fix: str) -> None:
        shutil.copytree(bench.tmp / "copy", bench.tmp / "c", dirs_exist_ok=True)

    return Scenario(name, make, "take an earlier checkpoint, or copy this one again", by=copy)


def pickles(name: str, damage: Callable[[Path], Any]) -> Scenario:
    from checkpoint.test_safe_pickle import write

    from mrlhf.checkpoint.safe_pickle import check_directory

    def take_again(bench: SimpleNamespace, command: Command, fix: str) -> None:
        write(bench.tmp / "d")

    return Scenario(
        name,
        call(lambda bench: check_directory(bench.tmp / "d"), lambda bench: damage(write(bench.tmp / "d"))),
        "do not load it; take it again from where it was made",
        by=take_again,
    )


def _convert(script: str) -> Callable[[SimpleNamespace], Command]:
    def make(bench: SimpleNamespace) -> Command:
        tool = bench.load(f"tools/convert/{script}.py")
        names = ("--hf", "--output") if script == "hf_to_megatron" else ("--checkpoint", "--output")
        flags = [names[0], str(bench.world / "qwen2"), names[1], str(bench.tmp / "o"), "--verify"]
        return Command(
            lambda command: tool.convert(tool.parser().parse_args(command.flags)), flags, env={"WORLD_SIZE": "2"}
        )

    return make


def _verify_later(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The printed command is one that verify.py takes, for the files of this one; nothing is converted here."""
    words = fix.removeprefix("without --verify, then ").split()
    assert words[:2] == ["python", "tools/convert/verify.py"]
    given = vars(bench.load(words[1]).parser().parse_args(words[2:]))
    assert {given["checkpoint"], given["hf"]} == {command.flags[1], command.flags[3]}
    command.flags = [*command.flags[:-1], "--dry-run"]
    if "--hf" not in command.flags:
        command.run, command.flags = (lambda command: None), []


def _to_float16(dtype: Any) -> Any:
    from mrlhf.convert import hf

    return hf._stored_form("w", torch.full((1,), 1e6), SimpleNamespace(transposed=False), dtype)


def _refused(path: Any) -> None:
    from mrlhf.convert import hf

    hf._refuse_existing(Path(path))


CHECKPOINTS = [
    checkpoint("manifest that is no JSON", lambda folder: (folder / manifest.MANIFEST).write_text("x")),
    checkpoint(
        "manifest that was edited",
        lambda folder: (folder / manifest.MANIFEST).write_text(
            (folder / manifest.MANIFEST).read_text().replace('"step": 1', '"step": 2')
        ),
    ),
    checkpoint("checkpoint with a damaged file", lambda folder: (folder / "a").write_text("Content")),
    pickles("index that is missing", lambda folder: (folder / ".metadata").unlink()),
    pickles("index that is damaged", lambda folder: (folder / ".metadata").write_bytes(b"\x80\2}")),
    pickles("checkpoint of another format", lambda folder: (folder / "metadata.json").write_text("{}")),
    Scenario("verify under torchrun", _convert("hf_to_megatron"), "without --verify, then python .*", by=_verify_later),
    Scenario(
        "verify an export under torchrun",
        _convert("megatron_to_hf"),
        "without --verify, then python .*",
        by=_verify_later,
    ),
    state(_refused, "/", "another --output, or remove it first", "/none", "conversion that exists"),
    state(_to_float16, torch.float16, "--dtype bfloat16", torch.bfloat16, "values beyond float16"),
]

SCENARIOS = [*SETS, *TOKENIZERS, *MODELS, *CHECKPOINTS]
