"""The headers and the index of safetensors files, read with bounds: which tensor lies where."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from mrlhf.config.foreign import AGAIN, LIMIT, parse_json, read_json, typed
from mrlhf.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
         "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}


class Entry(NamedTuple):
    """A tensor in a safetensors file; `start` and `stop` count bytes from the beginning of the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, as text and parsed."""

    raw: str
    tensors: dict[str, Entry]


class Stored(msgspec.Struct):
    """A tensor as the header of its file tells; data_offsets count from the end of the header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 48)]], Meta(max_length=8)]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], int]


class Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


def parse_header(raw: str | bytes, where: str) -> tuple[dict[str, str], dict[str, Stored]]:
    """(metadata, tensors) of a header's text. Raises CheckpointError."""
    entries = parse_json(raw, dict[str, dict[str, Any]], where=where)
    meta = entries.pop("__metadata__", {"format": "pt"})
    return typed(meta, dict[str, str], where=where), typed(entries, dict[str, Stored], where=where)


def are_contiguous(tensors: Iterable[Stored]) -> bool:
    """Whether the tensors lie one behind the other from the first byte on, each in as many bytes as it needs."""
    at = 0
    for entry in sorted(tensors, key=lambda entry: entry.data_offsets):
        stop = at + math.prod(entry.shape) * _BITS.get(entry.dtype, 0) // 8
        if entry.data_offsets != (at, stop):
            return False
        at = stop
    return True


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is cut off, or whose header does not describe its bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                what = f"its header would be {length:,} bytes long in a file of {size:,}"
                raise CheckpointError(what, where=str(path), fix=AGAIN)
            raw = f.read(min(length, LIMIT + 1))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path), fix=AGAIN) from error
    data, tensors = 8 + length, {}
    for name, entry in parse_header(raw, str(path))[1].items():
        start, stop = entry.data_offsets
        if entry.dtype not in _BITS or stop - start != math.prod(entry.shape) * _BITS[entry.dtype] // 8:
            raise CheckpointError(f"the header gives {name} {entry}", where=str(path), fix=AGAIN)
        tensors[name] = Entry(entry.dtype, tuple(entry.shape), data + start, data + stop)
    end = max((entry.stop for entry in tensors.values()), default=data)
    if size != end:
        cut = [name for name, entry in tensors.items() if entry.stop > size]
        what = f"{size:,} bytes instead of {end:,}" + (f": {', '.join(cut[:3])} not whole" if cut else "")
        raise CheckpointError(what, where=str(path), fix=AGAIN)
    spans = sorted((entry.start, entry.stop) for entry in tensors.values())
    if any(stop > following for (_, stop), (following, _) in zip(spans, spans[1:], strict=False)):
        raise CheckpointError("tensors overlap", where=str(path), fix=AGAIN)
    return Header(raw.decode(), tensors)


def open_files(directory: Path) -> tuple[dict[str, str], dict[str, Header]]:
    """(tensor -> file, file -> header). Raises CheckpointError for a missing or damaged file."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError("no safetensors weights", where=str(directory), expected=f"{SINGLE} or {INDEX}",
                                  fix="save the model with safetensors")
        header = read_header(directory / SINGLE)
        return dict.fromkeys(header.tensors, SINGLE), {SINGLE: header}
    files = read_json(index, Index).weight_map
    outside = [f for f in files.values() if Path(f).name != f]
    if outside:
        raise CheckpointError(f"the index names a file outside the directory: {outside[0]!r}", where=str(index))
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            lost = [name for name, f in files.items() if f == file]
            what = f"the shard {file} is missing, with {len(lost)} tensors: {', '.join(lost[:3])} ..."
            raise CheckpointError(what, where=str(index), fix=AGAIN)
    headers = {file: read_header(directory / file) for file in sorted(set(files.values()))}
    strays = [f"{name} (in {file})" for name, file in files.items() if name not in headers[file].tensors]
    if strays:
        what = f"the index names tensors that are not in their files: {', '.join(strays[:3])}"
        raise CheckpointError(what, where=str(index), fix=AGAIN)
    return files, headers
