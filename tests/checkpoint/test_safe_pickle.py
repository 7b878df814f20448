"""Whatever is written into a checkpoint's pickles, nothing of it runs: a corpus of hostile ones leaves no mark."""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import importlib
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mrlhf.checkpoint.safe_pickle import check_directory, read_metadata
from mrlhf.errors import CheckpointError

_FORM = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def places(file: str = "__0_0.distcp", length: int = 10, **more: Any) -> dict[MetadataIndex, Any]:
    return {MetadataIndex("layer._extra_state/shard_0_1"): filesystem._StorageInfo(file, 0, length, **more)}


def index(storage: dict[MetadataIndex, Any] | None = None) -> Metadata:
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), torch.Size([2]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]
    )
    return Metadata(
        {"layer._extra_state/shard_0_1": BytesStorageMetadata(), "w": tensor}, None, storage or places(), StorageMeta()
    )


PROTOCOLS = pytest.mark.parametrize("protocol", [2, 4])  # of `.metadata` in checkpoints of format 3, and of format 2


def write(
    directory: Path,
    *,
    protocol: int = 2,
    blob: bytes | None = None,
    metadata: bytes | None = None,
    common: bytes | None = None,
) -> Path:
    """A torch_dist directory with one byte object."""
    directory.mkdir(exist_ok=True)
    blob = saved([None, torch.ones(3), collections.OrderedDict(a=1)]) if blob is None else blob
    (directory / "__0_0.distcp").write_bytes(blob)
    (directory / ".metadata").write_bytes(
        pickle.dumps(index(places(length=len(blob))), protocol) if metadata is None else metadata
    )
    (directory / "common.pt").write_bytes(
        saved({"content_metadata": {"a": 1.5}, "param_groups": [1, "x", None]}) if common is None else common
    )
    (directory / "metadata.json").write_text(json.dumps(_FORM))
    return directory


class Call:
    """Pickles as the call function(*arguments), and what BUILD gets."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """pickle wants functions that can be called, also where one is the result of a call."""


def raw(*parts: Any, protocol: int) -> bytes:
    """A pickle from operations and texts; for protocol 2 the operations that protocol 4 alone has are replaced."""
    out: list[bytes] = []
    for part in parts:
        if protocol == 2 and part == pickle.STACK_GLOBAL:
            out[-2:] = [pickle.GLOBAL + b"\n".join(text[5:] for text in out[-2:]) + b"\n"]
        elif protocol == 2 and part == pickle.MEMOIZE:
            out.append(pickle.BINPUT + b"\0")
        else:
            out.append(
                part if isinstance(part, bytes) else pickle.BINUNICODE + struct.pack("<I", len(part)) + part.encode()
            )
    return pickle.PROTO + bytes([protocol]) + b"".join(out) + b"."


def hostile(mark: Path, protocol: int) -> dict[str, bytes]:
    """Pickles that would make the file `mark`, or change the process, when they are loaded."""
    command, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    text = code.encode()
    attribute = Call(getattr, Call(importlib.import_module, "os"), "system")
    objects = {
        "os.system": Call(os.system, command),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.open": Call(open, str(mark), "w"),
        "getattr chain": Call(attribute, command),
        "getattr of an allowed class": Call(getattr, torch.Size, "__class__"),
        "nested in plain data": {"a": [1, (2, {"b": Call(os.system, command)})]},
        "nested in a Metadata": Metadata({"w": Call(os.system, command)}, None, places(), StorageMeta()),  # type: ignore[dict-item]
        "argument of an allowed call": Call(torch.Size, [Call(os.system, command)]),
        "state of an allowed class": Call(collections.OrderedDict, state={"x": Call(os.system, command)}),
        "operator.attrgetter": Call(operator.attrgetter("system"), Call(importlib.import_module, "os")),
        "functools.partial": Call(functools.partial, os.system, command),
        "subprocess": Call(subprocess.Popen, ["touch", str(mark)]),
        "numpy _reconstruct": Call(
            np._core.multiarray._reconstruct,
            np.ndarray,
            (0,),
            b"b",
            state=(1, (1,), np.dtype("O"), False, [Call(os.system, command)]),
        ),
        "numpy load": Call(np.load, io.BytesIO(pickle.dumps(Call(os.system, command)))),
        "torch.load": Call(torch.load, io.BytesIO(saved(Call(os.system, command)))),
        "torch.hub": Call(torch.hub.load, "/nowhere", "x"),
        "inner pickle": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        "more bytes than memory": Call(bytearray, 1 << 50),
        "a tensor beyond memory": Call(torch.FloatTensor, 1 << 50),
        "copyreg": Call(copyreg._reconstructor, Path, object, None),
        "allowed namespace, another name": Call(torch.serialization.add_safe_globals, [os.system]),
    }
    made = {name: _dumps(value, protocol) for name, value in objects.items()}
    build = functools.partial(raw, protocol=protocol)
    system, sg, mem = ("posix", "system", pickle.STACK_GLOBAL), pickle.STACK_GLOBAL, pickle.MEMOIZE
    size = ("torch.distributed.checkpoint.metadata", "MetadataIndex", sg)
    return made | {
        "INST": b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'" + command.encode() + b"'\no.",
        "GLOBAL protocol 0": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "dotted name": build("torch", "hub.os.system", sg, command, pickle.TUPLE1, pickle.REDUCE),
        "dotted name of an allowed class": build("torch", "Size.__init__.__globals__", sg),
        "memo": build(*system, mem, pickle.POP, pickle.BINGET + b"\0", command, pickle.TUPLE1, pickle.REDUCE),
        "BUILD on a class": build(
            *size, pickle.NONE, pickle.EMPTY_DICT, "__hash__", "x", pickle.SETITEM, pickle.TUPLE2, pickle.BUILD
        ),
        "BUILD of an unknown field": build(
            *size, pickle.EMPTY_TUPLE, pickle.NEWOBJ, pickle.EMPTY_DICT, "__class__", "x", pickle.SETITEM, pickle.BUILD
        ),
        "NEWOBJ of another class": build("subprocess", "Popen", sg, command, pickle.TUPLE1, pickle.NEWOBJ),
        "NEWOBJ with arguments": build("torch", "Size", sg, pickle.EMPTY_TUPLE, pickle.NEWOBJ),
        "NEWOBJ_EX": build("posix", "system", sg, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.NEWOBJ_EX),
        "call of what is no function": build("x", pickle.EMPTY_TUPLE, pickle.REDUCE),
        "PERSID": b"Pos.system\n.",
        "BINPERSID": build("x", pickle.BINPERSID),
        "EXT1": b"\x82\x01.",
        "BYTEARRAY8": b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 40) + text,
        "a length beyond memory": b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 1 << 60) + text,
        "a memo index beyond memory": b"\x80\x04N"
        + pickle.LONG_BINPUT
        + struct.pack("<I", (1 << 32) - 1)
        + b"0cposix\nsystem\n.",
        "a name with a line break": build("torch\nSize\n(tR", "Size", sg),
        "a name from the memo, replaced": build(
            "torch", mem, "posix", mem, pickle.BINGET + b"\0", pickle.BINGET + b"\1", "system", sg
        ),
        "cut": _dumps(index(), protocol)[:-20],
        "empty": b"",
        "noise": bytes(range(256)),
    }


def _dumps(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def archive(pkl: bytes, *, more: dict[str, bytes] | None = None) -> bytes:
    """As torch.save packs a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, data in {"data.pkl": pkl, "byteorder": b"little", **(more or {}), "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", data)
    return out.getvalue()


def refused(directory: Path, file: str, check: Callable[[Path], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(directory)
    assert caught.value.where == str(directory / file), caught.value
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_a_save_writes_passes(tmp_path: Path, protocol: int) -> None:
    check_directory(write(tmp_path / "c", protocol=protocol))
    found = read_metadata(tmp_path / "c")
    assert found == index(places(length=found.storage_data[MetadataIndex("layer._extra_state/shard_0_1")].length))


@PROTOCOLS
def test_an_index_of_an_older_python(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 3.11.4 a member of an enum is a call of getattr. Such an index is read, and none is written any more."""
    from mrlhf.checkpoint.tensor_archive import write_metadata

    def reduced(self: enum.Enum, _: int) -> Any:
        return getattr, (type(self), self.name)

    monkeypatch.setattr(enum.Enum, "__reduce_ex__", reduced)
    old = pickle.dumps(index(), protocol)
    assert b"getattr" in old
    write_metadata(tmp_path, index())
    assert b"getattr" not in (tmp_path / ".metadata").read_bytes()
    monkeypatch.undo()
    assert read_metadata(write(tmp_path / "c", metadata=old)) == index()
    for kind, name in ((MetadataIndex, "__init__"), (type(index()), "mro")):
        evil = _dumps(Call(getattr, kind, name), protocol)
        assert "asks for an attribute" in refused(write(tmp_path / "d", metadata=evil), ".metadata", read_metadata)


@PROTOCOLS
def test_hostile_pickles_leave_no_mark(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    corpus = hostile(mark, protocol)
    assert len(corpus) > 42
    environment, before = dict(os.environ), (MetadataIndex.__hash__, set(torch.serialization.get_safe_globals()))
    for name, evil in corpus.items():
        where = tmp_path / "c"
        texts = [
            refused(write(where, metadata=evil), ".metadata", check_directory),
            refused(where, ".metadata", read_metadata),
            refused(write(where, blob=archive(evil)), "__0_0.distcp", check_directory),
            refused(write(where, common=archive(evil)), "common.pt", check_directory),
        ]
        assert not mark.exists(), name
        assert all("is not what a checkpoint holds" in text for text in texts), (name, texts)
    assert environment == dict(os.environ) and before == (
        MetadataIndex.__hash__,
        set(torch.serialization.get_safe_globals()),
    )
    pickle.loads(corpus["os.system"])
    assert mark.exists(), "the corpus itself is harmless: this test would prove nothing"


@PROTOCOLS
def test_deep_nesting_is_refused(tmp_path: Path, protocol: int) -> None:
    n = 1_000_000
    for parts in (
        [pickle.EMPTY_TUPLE, pickle.TUPLE1 * n],
        [pickle.EMPTY_LIST * n, pickle.APPEND * (n - 1)],
        [pickle.MARK * n],
    ):
        refused(write(tmp_path / "c", metadata=raw(*parts, protocol=protocol)), ".metadata", check_directory)


def test_hostile_archives(tmp_path: Path) -> None:
    """What torch.load would take besides the plain archive:
    its two older forms, which are raw pickles, and programs.
    """
    mark = tmp_path / "mark"
    evil, good = _dumps(Call(os.system, f"touch {mark}")), saved([None])
    old = io.BytesIO()
    torch.save(Call(os.system, f"touch {mark}"), old, _use_new_zipfile_serialization=False)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    twice = archive(b"\x80\x04N.", more={"data.pkl": evil})
    for blob in (evil, old.getvalue(), script.getvalue(), twice, good[:-5], good + archive(evil), b"PK"):
        where = write(tmp_path / "c", blob=blob)
        refused(where, "__0_0.distcp", check_directory)
        assert not mark.exists()


@PROTOCOLS
@pytest.mark.parametrize(
    "storage",
    [
        places("../../secret"),
        places("/etc/passwd"),
        places("__0_0.distcp/../../x"),
        places(""),
        {MetadataIndex("x"): "__0_0.distcp"},
        {"x": filesystem._StorageInfo("__0_0.distcp", 0, 1)},
        places(length=-1),
        places(transform_descriptors=["zstd"]),
    ],
)
def test_the_index_leads_nowhere_else(tmp_path: Path, storage: dict[MetadataIndex, Any], protocol: int) -> None:
    refused(write(tmp_path / "c", metadata=_dumps(index(storage), protocol)), ".metadata", check_directory)


def test_another_format_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    where = write(tmp_path / "c")
    for form in ("{}", "no", json.dumps({**_FORM, "sharded_backend": "zarr"})):
        (where / "metadata.json").write_text(form)
        refused(where, "metadata.json", check_directory)
    for file in ("metadata.json", "common.pt", "__0_0.distcp", ".metadata"):
        (write(where) / file).unlink()
        refused(where, file, check_directory)


def test_every_way_to_load_looks_first(tmp_path: Path) -> None:
    """Training and resuming, the converters, inspect_checkpoint; torch itself runs the program."""
    from torch.distributed.checkpoint import FileSystemReader

    from mrlhf.checkpoint.optimizer_state import open_dist
    from mrlhf.checkpoint.reader import DistReader
    from mrlhf.convert.inspect import checkpoint_tensors

    mark = tmp_path / "mark"
    evil = _dumps(Call(os.system, f"touch {mark}"))
    where = write(tmp_path / "c", metadata=evil)
    for load in (DistReader, checkpoint_tensors, open_dist):
        refused(where, ".metadata", load)
    refused(write(tmp_path / "c", blob=archive(evil)), "__0_0.distcp", open_dist)
    refused(write(tmp_path / "c", common=archive(evil)), "common.pt", open_dist)
    assert not mark.exists()
    with pytest.raises(AttributeError):  # of the 0 that the program gave back
        FileSystemReader(str(write(tmp_path / "c", metadata=evil))).read_metadata()
    assert mark.exists(), "torch has stopped running what is in .metadata: this module may have become needless"
