"""Files that others wrote: JSON read with bounds, and no link followed out of their directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from mrlhf.errors import CheckpointError, MrlhfError

LIMIT = 100_000_000  # bytes of JSON, as safetensors limits its headers
_DEPTH = 32  # what copies, prints or writes the value recurses once a level
AGAIN = "copy or download the file again"
_OBJECT = dict[str, Any]


def read_json(path: Path, kind: Any = _OBJECT, *, nan: bool = False, error: type[MrlhfError] = CheckpointError,
              fix: str = AGAIN) -> Any:
    """A file's JSON, checked against a type that msgspec knows, with its bounds. nan: also NaN and infinities.

    Raises `error`, naming the file, where it is missing, something else, too long or too deep.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for its writer
            raise error("no such file", where=str(path), fix=fix)
        with path.open("rb") as file:
            # as much as there is: a read of so many bytes takes memory for all of them
            text = file.read(min(os.fstat(file.fileno()).st_size, LIMIT) + 1)
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=str(path), fix=fix) from problem
    return parse_json(text, kind, where=str(path), nan=nan, error=error, fix=fix)


def parse_json(text: bytes | str, kind: Any = _OBJECT, *, where: str, nan: bool = False,
               error: type[MrlhfError] = CheckpointError, fix: str = AGAIN) -> Any:
    """Like `read_json`, of a text in UTF-8."""
    try:
        if len(text) > LIMIT:
            raise ValueError(f"longer than {LIMIT:,} bytes")
        value = json.loads(text) if nan else msgspec.json.decode(text)
        level: list[Any] = [[value]]
        for _ in range(_DEPTH):
            level = [x for v in level for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, dict | list)]
        if level:
            raise ValueError(f"nested more than {_DEPTH} deep")
    except (ValueError, RecursionError) as problem:  # ValueError: also msgspec's and UnicodeDecodeError
        raise error(f"not the JSON that belongs here: {problem}", where=where, fix=fix) from problem
    return typed(value, kind, where=where, error=error, fix=fix)


def typed(value: object, kind: Any, *, where: str, error: type[MrlhfError] = CheckpointError, fix: str = AGAIN) -> Any:
    """A value from JSON as a msgspec type. Raises `error` where it is something else, or out of its bounds."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise error(f"not the JSON that belongs here: {problem}", where=where, fix=fix) from problem


def check_links(directory: Path, files: Iterable[Path]) -> None:
    """Raises CheckpointError for files that lead out of their directory, and out of its repository in the hub's cache.

    Their content would travel into checkpoints and exports.
    """
    home = directory.resolve()
    roots = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        roots.append(home.parent.parent / "blobs")  # a snapshot of the hub's cache is made of links to these
    outside = [f.name for f in files if not any(f.resolve().is_relative_to(root) for root in roots)]
    if outside:
        what = f"{', '.join(outside[:5])}{' ...' if len(outside) > 5 else ''}: a link out of the directory"
        fix = "copy the file into the directory, or remove the link"
        raise CheckpointError(what, where=str(directory), expected="files, and links to files beside them", fix=fix)
