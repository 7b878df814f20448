"""Fixes of models, checkpoints and conversions: files that are damaged, missing or of another kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mrlhf.checkpoint import manifest

from .harness import By, Command, Scenario, call, state

# ---------------------------------------------------------------- models


def _model(bench: SimpleNamespace) -> Path:
    shutil.copytree(bench.world / "qwen2", bench.tmp / "m")
    return bench.tmp / "m"


def _read_model(bench: SimpleNamespace) -> None:
    from mrlhf.models.families import spec_from_hf
    from mrlhf.models.hf_files import HFReader, side_files

    folder = bench.tmp / "m"
    spec = spec_from_hf(json.loads((folder / "config.json").read_text()))
    side_files(folder)
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


def _unreadable(folder: Path) -> None:
    """Reading it is an I/O error."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/proc/self/mem")


def _link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def _copied(bench: SimpleNamespace) -> None:
    (bench.tmp / "m/config.json").unlink()
    shutil.copy(bench.tmp / "config.json", bench.tmp / "m")


def _records(folder: Path) -> Path:
    (folder / "records.json").write_text("{}")
    return folder / "records.json"


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
    model("weights that cannot be read", _unreadable),
    model(
        "config that is a link",
        lambda folder: _link(folder),
        fix="copy the file into the directory, or remove the link",
        by=lambda bench, command, fix: _copied(bench),
    ),
    model(
        "link that is not needed",
        lambda folder: (folder / "notes.txt").symlink_to("/etc/hostname"),
        fix="copy the file into the directory, or remove the link",
        by=lambda bench, command, fix: (bench.tmp / "m/notes.txt").unlink(),
    ),
    model(
        "records beside the weights",
        lambda folder: os.truncate(_records(folder), (1 << 30) + 1),
        fix="move it out of the directory",
        by=lambda bench, command, fix: (bench.tmp / "m/records.json").rename(bench.tmp / "records.json"),
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


def _wrong_type(folder: Path) -> None:
    content = {"stage": "sft", "step": 1, "head": "none", "dtype": "float32", "resumable": True}
    manifest.write_manifest(folder, content)


def _generators(bench: SimpleNamespace) -> Command:
    """A run that goes on from the newest checkpoint, whose states of random generators cannot be restored."""
    from mrlhf.checkpoint import rng, source

    for step, states in ((1, rng.capture()), (2, "{}")):
        (bench.tmp / f"step_{step}/rng").mkdir(parents=True)
        (bench.tmp / f"step_{step}/rng/rank_0.json").write_text(states)

    def run(command: Command) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
            newest = manifest.steps_in(bench.tmp)[0]
            source.restore_randomness(SimpleNamespace(path=newest, manifest={"layout": {"world": 1}}))

    return Command(run)


def _megatron(bench: SimpleNamespace) -> Path:
    """A checkpoint of Megatron-LM with one tensor."""
    from mrlhf.checkpoint.tensor_archive import Item, build_index, save_tensor, write_metadata

    rows = json.loads((bench.world / "qwen2/config.json").read_text())["vocab_size"]
    target, value = bench.tmp / "megatron/iter_0000002", torch.zeros(rows, 128)
    target.mkdir(parents=True, exist_ok=True)
    with (target / "__0_0.distcp").open("w+b", buffering=0) as file:
        length = save_tensor(value, file.fileno(), 0)
    shapes = (0, 0), tuple(value.shape), tuple(value.shape)
    item = Item("embedding.word_embeddings.weight", *shapes, value.dtype, 0, length)
    write_metadata(target, build_index([("__0_0.distcp", [item])]))
    (target.parent / "latest_checkpointed_iteration.txt").write_text("2")
    return target.parent


def _of_format_torch(bench: SimpleNamespace) -> None:
    folder = _megatron(bench)
    shutil.copytree(bench.world / "qwen2", folder / "hf")
    shutil.rmtree(folder / "iter_0000002")
    (folder / "iter_0000002/mp_rank_00").mkdir(parents=True)


def _open_megatron(prepared: Callable[[SimpleNamespace], Any]) -> Callable[[SimpleNamespace], Command]:
    from mrlhf.checkpoint.source import open_source

    return call(lambda bench: open_source(str(bench.tmp / "megatron")), prepared)


CHECKPOINTS = [
    Scenario(
        "checkpoint of Megatron-LM alone",
        _open_megatron(_megatron),
        "copy config.json and the tokenizer's files of the model's HF directory to .*/hf",
        by=lambda bench, command, fix: shutil.copytree(bench.world / "qwen2", fix.split()[-1]),
    ),
    Scenario(
        "checkpoint of Megatron-LM in the format torch",
        _open_megatron(_of_format_torch),
        "save it with --ckpt-format torch_dist",
        by=lambda bench, command, fix: _megatron(bench),
    ),
    checkpoint("manifest that is no JSON", lambda folder: (folder / manifest.MANIFEST).write_text("x")),
    checkpoint(
        "manifest that was edited",
        lambda folder: (folder / manifest.MANIFEST).write_text(
            (folder / manifest.MANIFEST).read_text().replace('"step": 1', '"step": 2')
        ),
    ),
    checkpoint("manifest of wrong types", _wrong_type),
    checkpoint("checkpoint with a damaged file", lambda folder: (folder / "a").write_text("Content")),
    pickles("index that is missing", lambda folder: (folder / ".metadata").unlink()),
    pickles("index that is damaged", lambda folder: (folder / ".metadata").write_bytes(b"\x80\2}")),
    pickles("format that is no JSON", lambda folder: (folder / "metadata.json").write_text("x")),
    pickles("checkpoint of another format", lambda folder: (folder / "metadata.json").write_text("{}")),
    Scenario("verify under torchrun", _convert("hf_to_megatron"), "without --verify, then python .*", by=_verify_later),
    Scenario(
        "verify an export under torchrun",
        _convert("megatron_to_hf"),
        "without --verify, then python .*",
        by=_verify_later,
    ),
    Scenario(
        "states of random generators",
        _generators,
        "move step_2 away; the same command then goes on from the checkpoint before it",
        by=lambda bench, command, fix: shutil.move(bench.tmp / fix.split()[1], bench.tmp / "away"),
    ),
    state(_refused, "/", "another --output, or move it away first", "/none", "conversion that exists"),
    state(_to_float16, torch.float16, "--dtype bfloat16", torch.bfloat16, "values beyond float16"),
]

SCENARIOS = [*MODELS, *CHECKPOINTS]
