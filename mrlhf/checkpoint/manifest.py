"""What makes a checkpoint whole: its manifest `mrlhf.json`, sealed with its own SHA-256, lists every file with size and SHA-256.

A checkpoint directory is called step_N; without a manifest, or with a file that is not as the manifest says, it is not whole. Everything
here is plain files: no torch, no collectives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import mrlhf
from mrlhf.errors import CheckpointError

MANIFEST, FORMAT = "mrlhf.json", 3
_READABLE = (2, FORMAT)  # 2: `.metadata` is a pickle of protocol 4 instead of 2
_EARLIER = "take an earlier checkpoint, or copy this one again"
Entry = dict[str, Any]  # {"size": bytes, "sha256": hex} of one file


def fsync(path: Path) -> None:
    """Push a file's content, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: temporary name, fsync, rename."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    fsync(tmp)
    os.replace(tmp, path)


def entry(path: Path) -> Entry:
    """Size and SHA-256 of a file (1.3 GiB/s a core here, BLAKE2b 0.8)."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, "sha256": found}


class HashBehind:
    """The entry of a file while it is written from its beginning: a thread reads and hashes behind the writer, beside it on another core."""

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._end, self._last = path, hashlib.sha256(), 0, False
        self._error: Exception | None = None
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self._thread.start()

    def up_to(self, end: int, *, last: bool = False) -> None:
        """The file's first `end` bytes will not change any more."""
        with self._more:
            self._end, self._last = end, last
            self._more.notify()

    def entry(self, end: int) -> Entry:
        """Waits for the whole file of `end` bytes. Raises what kept the thread from reading it: OSError, or MemoryError."""
        self.up_to(end, last=True)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return {"size": end, "sha256": self._hash.hexdigest()}

    def _run(self) -> None:
        at = 0
        try:
            buffer = memoryview(bytearray(1 << 22))
            with self._path.open("rb", buffering=0) as file:
                while True:
                    with self._more:
                        while self._end == at and not self._last:
                            self._more.wait()
                        end, last = self._end, self._last
                    while at < end:
                        n = file.readinto(buffer[: min(len(buffer), end - at)])
                        if not n:
                            raise OSError(f"{self._path} is shorter than what was written to it")
                        self._hash.update(buffer[:n])
                        at += n
                    if last:
                        return
        except Exception as error:
            self._error = error


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "seal"}, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, content: dict[str, Any], *, known: dict[str, Entry] | None = None) -> None:
    """Last file of a checkpoint: `content`, and an entry of every file in `directory`. `known`: entries of files that are on the disk already."""
    known = known or {}
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST):
        name = path.relative_to(directory).as_posix()
        if name not in known:
            fsync(path)
        files[name] = known.get(name) or entry(path)
    for folder in {directory, *(directory / name for name in files)}:
        fsync(folder if folder.is_dir() else folder.parent)
    manifest = {**content, "format": FORMAT, "mrlhf": mrlhf.__version__, "files": files}
    write_text(directory / MANIFEST, json.dumps({**manifest, "seal": _seal(manifest)}, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises CheckpointError where it is missing, damaged or of another version."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError(f"a {type(manifest).__name__}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing: the checkpoint was not finished, or is damaged", where=str(directory)) from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise CheckpointError(f"not JSON: {error}", where=str(path), fix=_EARLIER) from error
    if manifest.get("format") not in _READABLE:
        raise CheckpointError(f"format {manifest.get('format')!r}", where=str(path), expected=" or ".join(map(str, _READABLE)))
    for name in manifest.get("files", {}):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"it names a file outside of the checkpoint: {name}", where=str(path))
    if manifest.get("seal") != _seal(manifest):
        raise CheckpointError("checksum differs from its own: the file is damaged or was edited", where=str(path), fix=_EARLIER)
    return manifest


def damage(directory: Path, files: dict[str, Entry], *, verify: str) -> list[str]:
    """Every file that is not as its entry says, with what is wrong. verify: "size" looks at sizes alone, "hash" reads every byte."""
    found = []
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}")
        elif verify == "hash" and entry(path)["sha256"] != expected["sha256"]:
            found.append(f"{name} has changed since it was written (SHA-256)")
    return found


def check(directory: Path, *, verify: str) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError naming what is missing or damaged."""
    manifest = read_manifest(directory)
    wrong = damage(directory, manifest["files"], verify=verify)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{'; '.join(wrong[:5])}{more}", where=str(directory), fix=_EARLIER)
    return manifest


def await_files(directory: Path, *, patience_s: float = 30.0) -> None:
    """Until every file of a checkpoint that another rank has seen whole is visible here too: shared file systems show new files late.

    Only what is missing is waited for, and what is missing after `patience_s` is for `check` to name.
    """
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if (directory / MANIFEST).is_file() and all((directory / name).is_file() for name in read_manifest(directory)["files"]):
            return
        time.sleep(0.1)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def steps_in(directory: Path) -> list[Path]:
    """The directories step_N in `directory`, whole or not, newest first."""
    return sorted((p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()), key=step_of, reverse=True)


def newest_whole(candidates: Iterable[Path], *, verify: str) -> tuple[Path | None, list[CheckpointError]]:
    """The first of `candidates` (newest first) that is whole, and what was wrong with those before it."""
    problems: list[CheckpointError] = []
    for path in candidates:
        try:
            check(path, verify=verify)
            return path, problems
        except CheckpointError as error:
            problems.append(error)
        except OSError as error:
            problems.append(CheckpointError(f"cannot be read: {error}", where=str(path)))
    return None, problems
