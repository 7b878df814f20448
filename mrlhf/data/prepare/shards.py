"""The work directory of one preprocessing job: one file a block of rows, so that an interrupted job can resume.

A shard is an .npz (a zip: every array has a checksum, a cut file cannot be opened) that appears by rename. It carries
the digest of its block: after an interruption a block is tokenised again unless its shard has the same digest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from mrlhf.data.prepare.tokenise import Batch
from mrlhf.errors import DataError
from mrlhf.observe.directory import DirectoryLock


@dataclass(frozen=True)
class Shard:
    """The samples of one block. N samples, R kept rows (pairs), T tokens.

    ids [T], mask uint8 [T] (empty for prompts), lengths int32 [N], row_samples int32 [R] (samples a row)
    keys uint64 [R, 2], split_keys uint64 [R] (empty where no option needs them)
    margins float32 [R] (NaN: none; pairs only), labels: JSON a row
    quarantine: {line, problem, row} of rows that could not be used
    """

    head: dict[str, Any]
    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    row_samples: np.ndarray
    keys: np.ndarray
    split_keys: np.ndarray
    margins: np.ndarray
    labels: list[bytes]
    quarantine: list[dict[str, Any]]


_ARRAYS = ("ids", "mask", "lengths", "row_samples", "keys", "split_keys", "margins")


def write_shard(path: Path, head: dict[str, Any], batch: Batch, dtype: np.dtype) -> None:
    """Write a shard under a temporary name, then rename it."""

    def joined(parts: list[Any], kind: Any) -> np.ndarray:
        return np.concatenate(parts).astype(kind, copy=False) if parts else np.empty(0, kind)

    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, head=np.frombuffer(msgspec.json.encode(head), np.uint8), ids=joined(batch.ids, dtype),
                 mask=joined(batch.masks, np.uint8), lengths=np.asarray([len(ids) for ids in batch.ids], np.int32),
                 row_samples=np.asarray(batch.row_samples, np.int32),
                 keys=np.frombuffer(b"".join(batch.keys), np.uint64).reshape(-1, 2),
                 split_keys=np.frombuffer(b"".join(batch.split_keys), np.uint64),
                 margins=np.asarray([np.nan if m is None else m for m in batch.margins], np.float32),
                 labels=np.frombuffer(b"\n".join(batch.labels), np.uint8),
                 quarantine=np.frombuffer(msgspec.json.encode(batch.quarantine), np.uint8))
    os.replace(temporary, path)


def read_head(path: Path) -> dict[str, Any] | None:
    """The head of a shard; None where there is no whole one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return msgspec.json.decode(arrays["head"].tobytes())
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError, EOFError):
        return None


def read_shard(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays `names` of a shard. Raises DataError where a checksum does not fit."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise DataError(f"the temporary file is damaged: {error}", where=str(path),
                        fix="delete it, then the same command with --resume") from error


def load_shard(path: Path) -> Shard:
    arrays = read_shard(path, "head", "labels", "quarantine", *_ARRAYS)
    labels, head, quarantine = (arrays.pop(name).tobytes() for name in ("labels", "head", "quarantine"))
    return Shard(head=msgspec.json.decode(head), labels=labels.split(b"\n") if labels else [],
                 quarantine=msgspec.json.decode(quarantine), **arrays)


class WorkDirectory:
    """`.NAME.work` beside the output, locked while in use. `finish` removes it; an interrupted job leaves it behind.

    `job`: hash of everything that decides the content of a shard, its block apart. Raises DataError where another
    process works on the same prefix, where unfinished work lies there and neither `resume` nor `discard` is set, or
    where that work belongs to another job.
    """

    def __init__(self, prefix: Path, *, job: str, resume: bool, discard: bool):
        self.path = prefix.parent / f".{prefix.name}.work"
        self._prefix, self._job, self.resume, self._discard = prefix, job, resume, discard
        self._lock: DirectoryLock | None = None
        self.shards_found = 0

    def shard(self, number: int) -> Path:
        return self.path / f"{number:08}.npz"

    def __enter__(self) -> WorkDirectory:
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(DirectoryLock(
                self.path / "lock", key=f"--output-prefix {self._prefix}", kind=DataError,
                fix="wait until it ends, or another --output-prefix"))
            self._open()
            stack.pop_all()  # the lock stays until __exit__
        return self

    def _open(self) -> None:
        job_file = self.path / "job"
        before = job_file.read_text() if job_file.is_file() else None
        self.shards_found = shards = len(list(self.path.glob("*.npz")))
        if shards and before is not None and not (self.resume or self._discard):
            raise DataError(f"unfinished work of an interrupted command ({shards} blocks of rows)",
                            where=str(self.path), fix="--resume to continue it, or --overwrite to start again")
        if shards and self.resume and before != self._job:
            raise DataError("the interrupted command had other options, another tokenizer or other input files",
                            where=str(self.path),
                            fix="the same command with --resume, or --overwrite without it to start again")
        for file in self.path.iterdir():
            if file.name not in ("lock", "job") and not (self.resume and file.suffix == ".npz"):
                file.unlink()
        job_file.write_text(self._job)

    def finish(self) -> None:
        shutil.rmtree(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        self._lock.release()
