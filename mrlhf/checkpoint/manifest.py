"""The manifest `mrlhf.json` lists every file of a checkpoint with size and SHA-256, and is sealed with its own SHA-256.

A checkpoint directory is called step_N. It is whole if it has a manifest and every file matches its entry. This module
works on plain files: no torch, no collectives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from msgspec import Meta

import mrlhf
from mrlhf.config.foreign import read_json, typed
from mrlhf.errors import CheckpointError

MANIFEST, FORMAT = "mrlhf.json", 4
_READABLE = (2, 3, FORMAT)  # 3: norms have other names (reader.py); 2: `.metadata` is a pickle of protocol 4 too
_FIX = "take an earlier checkpoint, or copy this one again"
FileEntry = dict[str, Any]  # {"size": bytes, "sha256": hex} of one file


def fsync(path: Path) -> None:
    """Push a file's content, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path`, whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        with temporary.open("wb") as file:
            yield file
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def remove(path: Path) -> None:
    """Removes a file or a whole directory; a symbolic link without its target."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file (1.3 GiB/s a core here, BLAKE2b 0.8)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


class HashBehind:
    """Hashes a file while it is written: a thread on another core reads behind the writer."""

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._end, self._last = path, hashlib.sha256(), 0, False
        self._error: Exception | None = None
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self._thread.start()

    def up_to(self, end: int, *, last: bool = False) -> None:
        """Tells the thread that the file's first `end` bytes are final."""
        with self._more:
            self._end, self._last = end, last
            self._more.notify()

    def entry(self, end: int) -> FileEntry:
        """Waits until all `end` bytes are hashed. Raises OSError or MemoryError that the thread met."""
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
    unsealed = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, content: dict[str, Any], *, known: dict[str, FileEntry] | None = None) -> None:
    """The last file of a checkpoint: `content`, and an entry for every file in `directory`.

    known: entries of files that have been hashed and fsync'ed already, by name.
    """
    known = known or {}
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST):
        name = path.relative_to(directory).as_posix()
        if name not in known:
            fsync(path)
        files[name] = known.get(name) or file_entry(path)
    for folder in {directory, *(directory / name for name in files)}:
        fsync(folder if folder.is_dir() else folder.parent)
    manifest = {**content, "format": FORMAT, "mrlhf": mrlhf.__version__, "files": files}
    write_text(directory / MANIFEST, json.dumps({**manifest, "seal": _seal(manifest)}, indent=1) + "\n")


class _File(msgspec.Struct):
    size: Annotated[int, Meta(ge=0)]
    sha256: str


class _Manifest(msgspec.Struct):
    """Types of the entries that this version reads."""

    files: dict[Annotated[str, Meta(min_length=1)], _File]
    stage: str
    step: Annotated[int, Meta(ge=0, le=1 << 53)]
    head: Literal["lm", "value"]
    dtype: Literal["float32", "bfloat16", "float16"]
    resumable: bool
    mrlhf: str
    layout: dict[str, Any] = {}
    hf_dtypes: dict[str, Literal["float32", "bfloat16", "float16"]] | None = None
    reward_mean: float = 0.0
    reward_std: float = 1.0
    scheduler: int = 0
    recent_losses: list[float] = []
    data: list[dict[str, Any]] | None = None
    eval: dict[str, float | None] = {}
    prompts_drawn: int = 0


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises CheckpointError where the manifest is missing, damaged or of an unknown format."""
    path = directory / MANIFEST
    if not path.is_file():
        what = f"{MANIFEST} is missing: the checkpoint was not finished, or is damaged"
        raise CheckpointError(what, where=str(directory))
    manifest: dict[str, Any] = read_json(path, nan=True, fix=_FIX)
    if manifest.get("format") not in _READABLE:
        expected = " or ".join(map(str, _READABLE))
        raise CheckpointError(f"format {manifest.get('format')!r}", where=str(path), expected=expected)
    files = manifest.get("files")
    for name in files if isinstance(files, dict) else ():
        if not name.isprintable() or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"it names a file outside of the checkpoint: {name!r}", where=str(path))
    if manifest.get("seal") != _seal(manifest):
        what = "checksum differs from its own: the file is damaged or was edited"
        raise CheckpointError(what, where=str(path), fix=_FIX)
    typed(manifest, _Manifest, where=str(path), fix=_FIX)
    return manifest


def damaged_files(directory: Path, files: dict[str, FileEntry], *, verify: str) -> list[str]:
    """What is wrong with each file that differs from its entry.

    verify: "size" compares sizes, "hash" also reads and hashes every byte.
    """
    problems = []
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}")
        elif verify == "hash" and file_entry(path)["sha256"] != expected["sha256"]:
            problems.append(f"{name} has changed since it was written (SHA-256)")
    return problems


def check_manifest(directory: Path, *, verify: str) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError naming the files that are missing or damaged."""
    manifest = read_manifest(directory)
    problems = damaged_files(directory, manifest["files"], verify=verify)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{'; '.join(problems[:5])}{more}", where=str(directory), fix=_FIX)
    return manifest


def await_files(directory: Path, *, patience_s: float = 30.0) -> None:
    """Waits until every file of a checkpoint that another rank has seen whole exists here too.

    Shared file systems show new files late. After `patience_s` it returns all the same: `check_manifest` names what is
    still missing.
    """
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        known = read_manifest(directory)["files"] if (directory / MANIFEST).is_file() else [MANIFEST]
        if all((directory / name).is_file() for name in known):
            return
        time.sleep(0.1)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def steps_in(directory: Path) -> list[Path]:
    """The directories step_N in `directory`, whole or not, newest first."""
    checkpoints = (p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir())
    return sorted(checkpoints, key=step_of, reverse=True)


def newest_whole(candidates: Iterable[Path], *, verify: str) -> tuple[Path | None, list[CheckpointError]]:
    """The first whole one of `candidates` (newest first), and the errors of those before it."""
    problems: list[CheckpointError] = []
    for path in candidates:
        try:
            check_manifest(path, verify=verify)
            return path, problems
        except CheckpointError as error:
            problems.append(error)
        except OSError as error:
            problems.append(CheckpointError(f"cannot be read: {error}", where=str(path)))
    return None, problems
