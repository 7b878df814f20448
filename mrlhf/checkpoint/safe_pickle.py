"""Reads and checks the pickles inside a distributed checkpoint.

torch reads a checkpoint's `.metadata` with plain pickle, and Megatron loads `common.pt` and the byte objects with
weights_only=False: both run any code that the file holds. Here all three go through torch's weights-only unpickler;
whatever passes it does nothing under plain pickle either. Tensors need no check: reader.py reads their bytes alone.

The unpickler alone lets more pass than a checkpoint needs: torch's own list has `bytearray` and `torch.Tensor`, which
allocate any number of bytes, and functions that rebuild tensor subclasses. So the names in a pickle are compared with
the lists below before anything is loaded.

This is the one module of the package that reads pickles (tests/test_security.py holds the others to it).
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import re
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from struct import pack
from typing import Any

import torch
from torch import _weights_only_unpickler as weights_only
from torch.distributed.checkpoint import filesystem, metadata, planner

from mrlhf.config.foreign import read_json
from mrlhf.errors import CheckpointError

_FIX = "do not load it; take it again from where it was made"
_FORMAT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}
_SHARD = re.compile(r"__\d+_\d+\.distcp")
_CLASSES = (
    metadata.Metadata, metadata.MetadataIndex, metadata.ChunkStorageMetadata, metadata.TensorStorageMetadata,
    metadata.StorageMeta, metadata.BytesStorageMetadata, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData,
)
_ENUMS = (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType)
_GETATTR = "builtins.getattr"  # so Python before 3.11.4 wrote the member of an enum
_METADATA_NAMES = {
    _GETATTR,
    "torch.Size", "torch.serialization._get_layout", *(f"{kind.__module__}.{kind.__qualname__}" for kind in _CLASSES),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_OBJECT_NAMES = {
    "argparse.Namespace", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.storage.UntypedStorage",
    *(f"torch.{name}" for name in vars(torch) if name.endswith("Storage")),
}


@contextmanager
def _guard(path: Path, content: str) -> Iterator[None]:
    """Every error becomes a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{content} cannot be read: {error.strerror}", where=str(path), fix=_FIX) from error
    except Exception as error:  # a damaged pickle fails in many ways: EOFError, IndexError, KeyError, TypeError ...
        # torch's text around the reason advises to load the file unchecked
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        if not isinstance(error, pickle.UnpicklingError):
            reason = f"it is damaged: {type(error).__name__}: {reason}"
        what = f"{content} is not what a checkpoint holds: {reason}"
        raise CheckpointError(what, where=str(path), fix=_FIX) from error


def _member(kind: Any, name: str) -> object:
    """Stands for getattr in an index."""
    if kind not in _ENUMS:
        raise pickle.UnpicklingError("it asks for an attribute, which no checkpoint needs")
    return kind[name]


def _check_names(pickled: bytes, allowed: Set[str]) -> None:
    if not pickled.startswith(pickle.PROTO + b"\2"):
        raise pickle.UnpicklingError("it is no pickle of protocol 2")
    unknown = weights_only.get_globals_in_pkl(io.BytesIO(pickled)) - allowed
    if unknown:
        raise pickle.UnpicklingError(f"it asks for {', '.join(sorted(unknown))}, which no checkpoint needs")


def _as_protocol_2(pickled: bytes) -> bytes:
    """A pickle of protocol 4, from a checkpoint of format 2, in the operations that the weights-only unpickler reads.

    The one difference that matters: protocol 4 takes module and name from the stack. So each string is repeated where
    the original fetches it from the memo, and the two strings before a STACK_GLOBAL are replaced by one GLOBAL.
    """
    operations = list(pickletools.genops(pickled))
    ends = [*(start for _, _, start in operations[1:]), len(pickled)]
    out, memo = [pickle.PROTO + b"\2"], list[bytes]()  # memo: what fetches each entry
    for (operation, value, start), end in zip(operations, ends, strict=True):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "SHORT_BINUNICODE" | "BINUNICODE":
                text = str(value).encode("utf-8", "surrogatepass")
                out.append(pickle.BINUNICODE + pack("<I", len(text)) + text)
            case "MEMOIZE" if out[-1].startswith(pickle.BINUNICODE):
                memo.append(out[-1])
            case "MEMOIZE":
                out.append(pickle.LONG_BINPUT + pack("<I", len(memo)))
                memo.append(pickle.LONG_BINGET + pack("<I", len(memo)))
            case "BINGET" | "LONG_BINGET":
                out.append(memo[int(value or 0)])
            case "STACK_GLOBAL":
                names = [part[5:] for part in out[-2:] if part.startswith(pickle.BINUNICODE)]
                if len(names) != 2 or any(b"\n" in name for name in names):
                    raise pickle.UnpicklingError("it takes a name from elsewhere than the two strings before")
                out[-2:] = [pickle.GLOBAL + b"\n".join(names) + b"\n"]
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "GET":
                raise pickle.UnpicklingError(f"it uses the operation {operation.name}, which no checkpoint needs")
            case _:
                out.append(pickled[start:end])
    return b"".join(out)


def _allowing(*names: Any) -> AbstractContextManager:
    """Lets torch's reader make these. torch would take away at the end what others (Megatron) have allowed before."""
    known = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([name for name in names if name not in known])


def read_metadata(directory: Path) -> metadata.Metadata:
    """The index of the tensors of a torch_dist directory. Takes 1.1 s for 10,000 chunks, 2.5 s in format 2.

    Raises CheckpointError naming the file where it is damaged, asks for a name that no checkpoint needs, or leads out
    of the directory.
    """
    path = directory / ".metadata"
    with _guard(path, "the index of the tensors"):
        pickled = path.read_bytes()
        if pickled.startswith((pickle.PROTO + b"\4", pickle.PROTO + b"\5")):
            pickled = _as_protocol_2(pickled)
        _check_names(pickled, _METADATA_NAMES)
        with _allowing(*_CLASSES, (_member, _GETATTR)):
            index = weights_only.load(io.BytesIO(pickled))
        _check_index(index)
        return index


def _check_index(index: object) -> None:
    """Raises UnpicklingError where an entry is of an unknown kind or its bytes would be read from somewhere else."""
    if not isinstance(index, metadata.Metadata):
        raise pickle.UnpicklingError(f"a {type(index).__qualname__} instead of a Metadata")
    if type(index.state_dict_metadata) is not dict or type(index.storage_data) is not dict:
        raise pickle.UnpicklingError("its tables are no dictionaries")
    for kind in map(type, index.state_dict_metadata.values()):
        if kind not in (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata):
            raise pickle.UnpicklingError(f"an entry is a {kind.__qualname__}")
    for key, place in index.storage_data.items():
        if type(key) is not metadata.MetadataIndex or type(place) is not filesystem._StorageInfo:
            raise pickle.UnpicklingError("an entry has no place")
        file, numbers = vars(place).get("relative_path"), [vars(place).get("offset"), vars(place).get("length")]
        if type(file) is not str or not _SHARD.fullmatch(file):
            raise pickle.UnpicklingError(f"{key.fqn} would be read from {file!r}")
        if any(type(n) is not int or n < 0 for n in numbers) or vars(place).get("transform_descriptors"):
            raise pickle.UnpicklingError(f"{key.fqn} has an unknown form")


def _load_object(data: bytes) -> Any:
    """Raises where `data` is anything but plain values and tensors in an archive of torch.save.

    torch's own reader opens the archive, so a later load sees the same records. No tensor is allocated ("meta").
    """
    _check_names(torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl"), _OBJECT_NAMES)
    with _allowing(argparse.Namespace):
        return torch.load(io.BytesIO(data), weights_only=True, map_location="meta")


def read_common(directory: Path) -> Any:
    """What all ranks shared when they saved: `common.pt`. Raises CheckpointError naming the file."""
    path = directory / "common.pt"
    with _guard(path, "the common state"):
        return _load_object(path.read_bytes())


def check_directory(directory: Path) -> metadata.Metadata:
    """Checks what Megatron would unpickle in a torch_dist directory: index, `common.pt` and byte objects, no tensor.
    Returns the index.

    Raises CheckpointError naming the file.
    """
    index, path = read_metadata(directory), directory / "metadata.json"
    form = read_json(path, fix=_FIX)
    if form != _FORMAT:
        raise CheckpointError(f"the format is {form}", where=str(path), expected=json.dumps(_FORMAT), fix=_FIX)
    read_common(directory)
    for key, place in index.storage_data.items():
        if not isinstance(index.state_dict_metadata.get(key.fqn), metadata.TensorStorageMetadata):
            with _guard(shard := directory / place.relative_path, f"the object {key.fqn}"), shard.open("rb") as file:
                file.seek(place.offset)
                _load_object(file.read(place.length))
    return index
