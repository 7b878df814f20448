"""The pickles inside a distributed checkpoint, looked at before torch or Megatron load them.

torch's `.metadata` is a plain pickle, and torch loads a checkpoint's byte objects with weights_only=False: either runs any
code that is written into it. Here both go through an unpickler that knows exactly the names that a save of ours writes and
no operation beyond those that need them; so what passes here does nothing under pickle's own either. A tensor needs none
of this: torch reads it with weights_only=True.

This is the one module of the package that reads pickles (tests/test_security.py holds the others to it).
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from mrlhf.errors import CheckpointError

_FIX = "do not load it; take it again from where it was made"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_SHARD = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = tuple(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
# of these instances are made and filled; the values are attributes that Megatron sets beside the fields
_RECORDS: dict[type, frozenset[str]] = {
    metadata.Metadata: frozenset({"all_local_plans"}),
    metadata.MetadataIndex: frozenset(),
    metadata.ChunkStorageMetadata: frozenset(),
    metadata.TensorStorageMetadata: frozenset(),
    metadata.BytesStorageMetadata: frozenset(),
    metadata.TensorProperties: frozenset(),
    metadata.StorageMeta: frozenset(),
    filesystem._StorageInfo: frozenset(),
    planner.SavePlan: frozenset(),
    planner.WriteItem: frozenset(),
    planner.TensorWriteData: frozenset(),
    planner.BytesIOWriteData: frozenset(),
}
_CALLED = (torch.Size, torch.serialization._get_layout, planner.WriteItemType, metadata._MEM_FORMAT_ENCODING)
_METADATA_NAMES: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__name__): known for known in (*_RECORDS, *_CALLED)},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}


class _Storage:
    """Stands for a tensor's storage, whose bytes are not looked at."""


def _tensor(*parts: Any) -> None:
    """Stands for torch._utils._rebuild_tensor_v2."""


_OBJECT_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    **{("torch", name): _Storage for name in vars(torch) if name.endswith("Storage")},
    ("torch.storage", "UntypedStorage"): _Storage,
}
_PLAIN = (
    "PROTO FRAME STOP POP POP_MARK MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS "
    "GLOBAL STACK_GLOBAL"
).split()


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]  # the Python one: only its operations can be replaced
    """Knows `names` only, calls what is in `called` only, and fills instances of _RECORDS only."""

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN}  # type: ignore[attr-defined]
    stack: list[Any]

    def __init__(self, data: bytes, *, names: Mapping[tuple[str, str], Any], called: tuple[Any, ...], persistent: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._called, self._persistent = names, called, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint holds")
        return self._names[module, name]

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            code = error.args[0] if error.args else None
            known = {ord(getattr(pickle, name)): name for name in pickle.__all__ if name.isupper() and isinstance(getattr(pickle, name), bytes)}
            if code in known and code not in self.dispatch:
                raise pickle.UnpicklingError(f"it uses the operation {known[code]}, which no checkpoint needs") from error
            raise

    def _call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple or not any(function is known for known in self._called):
            raise pickle.UnpicklingError(f"it calls {_name(function)}, which no checkpoint does")
        self.stack[-1] = function(*arguments)

    def _new(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack[-1]
        if arguments != () or not any(kind is known for known in _RECORDS):
            raise pickle.UnpicklingError(f"it makes a {_name(kind)} in an unknown way")
        self.stack[-1] = object.__new__(kind)

    def _fill(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        kind = type(made)
        if kind not in _RECORDS:
            raise pickle.UnpicklingError(f"it changes the state of a {_name(kind)}")
        if kind is metadata.TensorProperties:  # has a way of its own: a tuple of its five fields
            made.__setstate__(state)
            return
        fields = {f.name for f in dataclasses.fields(kind)} | _RECORDS[kind]
        if type(state) is not dict or not fields.issuperset(state):
            raise pickle.UnpicklingError(f"it gives a {_name(kind)} fields that it does not have")
        vars(made).update(state)

    def _storage(self) -> None:
        what = self.stack.pop()
        if not (self._persistent and type(what) is tuple and len(what) == 5 and what[0] == "storage" and what[1] is _Storage):
            raise pickle.UnpicklingError("it refers to something outside of itself")
        self.stack.append(_Storage())

    for _operation, _method in ((pickle.REDUCE, _call), (pickle.NEWOBJ, _new), (pickle.BUILD, _fill), (pickle.BINPERSID, _storage)):
        dispatch[_operation[0]] = _method  # type: ignore[assignment]
    del _operation, _method


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _load(data: bytes, **allowed: Any) -> Any:
    """Raises pickle.UnpicklingError for everything that is not as a save writes it."""
    stream = _Unpickler(data, **allowed)
    try:
        return stream.load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways: EOFError, IndexError, KeyError, TypeError ...
        raise pickle.UnpicklingError(f"it is damaged: {type(error).__name__}: {error}") from error


def _guard(path: Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{what} is not what a checkpoint holds: {error}", where=str(path), fix=_FIX) from error
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read: {error.strerror}", where=str(path), fix=_FIX) from error


def read_metadata(directory: Path) -> metadata.Metadata:
    """The index of the tensors of a torch_dist directory. Time and memory grow with its size: about a second for each 5 MB.

    Raises CheckpointError naming the file for one that is damaged, asks for a name that no checkpoint needs, or leads out of the directory.
    """
    path = directory / ".metadata"

    def read() -> metadata.Metadata:
        found = _load(path.read_bytes(), names=_METADATA_NAMES, called=_CALLED, persistent=False)
        if type(found) is not metadata.Metadata or not {"state_dict_metadata", "storage_data"} <= set(vars(found)):
            raise pickle.UnpicklingError(f"a {_name(type(found))} instead of a Metadata")
        if type(found.state_dict_metadata) is not dict or type(found.storage_data) is not dict:
            raise pickle.UnpicklingError("its tables are no dictionaries")
        for kind in map(type, found.state_dict_metadata.values()):
            if kind not in (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata):
                raise pickle.UnpicklingError(f"an entry is a {_name(kind)}")
        for index, place in found.storage_data.items():
            if type(index) is not metadata.MetadataIndex or type(place) is not filesystem._StorageInfo:
                raise pickle.UnpicklingError("an entry has no place")
            file = vars(place).get("relative_path")
            if type(file) is not str or not _SHARD.fullmatch(file):
                raise pickle.UnpicklingError(f"{index.fqn} would be read from {file!r}")
            numbers = [vars(place).get("offset"), vars(place).get("length")]
            if any(type(n) is not int or n < 0 for n in numbers) or vars(place).get("transform_descriptors"):
                raise pickle.UnpicklingError(f"{index.fqn} has an unknown form")
        return found

    return _guard(path, "the index of the tensors", read)


def check_object(data: bytes) -> None:
    """Of what torch.save wrote: plain values and tensors only. Raises pickle.UnpicklingError.

    The archive is opened by torch's own reader, so that nothing else can be found in it later.
    """
    try:
        archive = torch._C.PyTorchFileReader(io.BytesIO(data))
        if "constants.pkl" in archive.get_all_records():
            raise pickle.UnpicklingError("it is a TorchScript program")
        content = archive.get_record("data.pkl")
    except RuntimeError as error:
        raise pickle.UnpicklingError(f"it is no archive of torch.save: {str(error).splitlines()[0]}") from error
    _load(content, names=_OBJECT_NAMES, called=(_tensor, OrderedDict), persistent=True)


def check_directory(directory: Path) -> None:
    """Everything in a torch_dist directory that Megatron would unpickle. Reads the index, `common.pt` and the byte objects, no tensor.

    Raises CheckpointError naming the file.
    """
    found, path = read_metadata(directory), directory / "metadata.json"
    form = _guard(path, "the note of the format", path.read_bytes)
    try:
        is_ours = json.loads(form) == _FORMAT
    except ValueError:
        is_ours = False
    if not is_ours:
        raise CheckpointError(f"the format is {form[:200]!r}", where=str(path), expected=json.dumps(_FORMAT), fix=_FIX)
    common = directory / "common.pt"
    _guard(common, "the common state", lambda: check_object(common.read_bytes()))
    for index, place in found.storage_data.items():
        if isinstance(found.state_dict_metadata.get(index.fqn), metadata.TensorStorageMetadata):
            continue
        shard = directory / place.relative_path

        def check(shard: Path = shard, start: int = place.offset, length: int = place.length) -> None:
            with shard.open("rb") as file:
                file.seek(start)
                check_object(file.read(length))

        _guard(shard, f"the object {index.fqn}", check)
