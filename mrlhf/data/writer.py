"""Writers of Megatron's indexed files and of the set of a PREFIX, whole or not at all. Formats: see indexed.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mrlhf.data.indexed import CODE_OF, HEADER, MAGIC, seal
from mrlhf.errors import DataError

_STRIDE = 1 << 20
_META_HEAD = b'{\n "format": '  # what `seal` begins PREFIX.json with
Integers = Sequence[int] | np.ndarray


class _Hashed:
    """A file written from its beginning and hashed meanwhile."""

    def __init__(self, path: Path):
        self._file: BinaryIO = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by close() or abandon()
        self._hash, self.bytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> dict[str, Any]:
        """Sync to disk; returns {bytes, sha256}."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


class IndexedWriter:
    """Appends documents to one .bin and writes its .idx at `close`.

    Lengths wait in a temporary file beside it, so memory does not grow with the number of sequences.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._idx_path = idx_path
        self._bin = _Hashed(bin_path)
        self._waiting = [Path(f"{idx_path}.lengths"), Path(f"{idx_path}.documents")]
        self._lengths, self._documents = (open(path, "w+b", buffering=1 << 20) for path in self._waiting)  # noqa: SIM115
        self.num_sequences = self.num_documents = 0
        self.digests: dict[str, dict[str, Any]] = {}

    def add_documents(self, values: np.ndarray, lengths: Integers, sizes: Integers) -> None:
        """Append documents: `values` [sum(lengths)] and `lengths` of all sequences, `sizes`: sequences a document."""
        lengths, sizes = np.asarray(lengths, dtype=np.int64), np.asarray(sizes, dtype=np.int64)
        if int(lengths.sum()) != len(values) or int(sizes.sum()) != len(lengths):
            shape = f"{len(lengths)} sequences in documents of {sizes.sum()}"
            raise ValueError(f"{len(values)} values, lengths of {lengths.sum()}, {shape}")
        self._bin.write(np.ascontiguousarray(values, dtype=self.dtype.newbyteorder("<")).data.cast("B"))
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._documents.write((self.num_sequences + np.cumsum(sizes)).astype("<i8").tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(sizes)

    def close(self) -> None:
        """Write the index and sync both files to disk; `digests` then holds {".bin": {bytes, sha256}, ".idx": ...}."""
        self.digests[".bin"] = self._bin.close()
        index = _Hashed(self._idx_path)
        index.write(HEADER.pack(MAGIC, 1, CODE_OF[self.dtype], self.num_sequences, self.num_documents + 1))
        self._lengths.seek(0)
        while data := self._lengths.read(4 * _STRIDE):
            index.write(data)
        self._lengths.seek(0)
        offset = 0
        while data := self._lengths.read(4 * _STRIDE):
            ends = offset + np.cumsum(np.frombuffer(data, "<i4"), dtype=np.int64)
            starts = np.concatenate([[offset], ends[:-1]])
            index.write((starts * self.dtype.itemsize).astype("<i8").tobytes())
            offset = int(ends[-1])
        index.write(np.zeros(1, "<i8").tobytes())
        self._documents.seek(0)
        while data := self._documents.read(8 * _STRIDE):
            index.write(data)
        self.digests[".idx"] = index.close()
        self.abandon()

    def abandon(self) -> None:
        self._bin.abandon()
        for file, path in zip((self._lengths, self._documents), self._waiting, strict=True):
            file.close()
            path.unlink(missing_ok=True)


class OutputSet:
    """The files of one PREFIX under temporary names, renamed together by `commit`, PREFIX.json last.

    A context manager: on exit it removes whatever was not committed, and earlier files of the prefix stay unchanged.
    `directory`, on the same disk, takes the temporary files (default: beside the prefix). Raises DataError when the
    prefix is taken and `overwrite` is false.
    """

    suffixes = (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx", "_margin.bin", "_margin.idx", "_labels.jsonl",
                ".json")

    def __init__(self, prefix: str | Path, *, overwrite: bool = False, directory: Path | None = None):
        self.prefix = Path(prefix)
        self._directory = directory or self.prefix.parent
        self.refuse_existing(self.prefix, overwrite=overwrite)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, IndexedWriter] = {}
        self._streams: dict[str, _Hashed] = {}
        self._temporary: dict[str, Path] = {}

    @classmethod
    def refuse_existing(cls, prefix: Path, *, overwrite: bool = False) -> None:
        """Raises DataError for a prefix that is taken. `overwrite`: only where the files are no set of this tool, but
        the user's own, as raw records in PREFIX.json.
        """
        files = {s: Path(f"{prefix}{s}") for s in cls.suffixes if Path(f"{prefix}{s}").exists()}
        meta = files.get(".json")
        is_set = ".bin" in files or ".idx" in files or (
            meta is not None and meta.is_file() and meta.open("rb").read(len(_META_HEAD)) == _META_HEAD)
        if files and not (overwrite and is_set):
            by_hand = "" if meta else " if a command of this tool left them unfinished"
            raise DataError(f"output exists already: {', '.join(file.name for file in files.values())}",
                            where=str(prefix), expected=None if is_set else "a prefix that no other files begin with",
                            fix="another --output-prefix" + (f", or --overwrite{by_hand}" if is_set else ""))

    def temporary(self, suffix: str) -> Path:
        """The path to write `suffix` to, from where a rename to its final place is atomic."""
        return self._temporary.setdefault(suffix, self._directory / f".{self.prefix.name}{suffix}.{os.getpid()}.tmp")

    def indexed(self, part: str, dtype: np.dtype) -> IndexedWriter:
        """A writer for PREFIX{part}.bin/.idx."""
        self._writers[part] = IndexedWriter(self.temporary(f"{part}.bin"), self.temporary(f"{part}.idx"), dtype)
        return self._writers[part]

    def stream(self, suffix: str) -> _Hashed:
        """A file PREFIX{suffix} to write to from its beginning."""
        self._streams[suffix] = _Hashed(self.temporary(suffix))
        return self._streams[suffix]

    def discard(self, suffix: str) -> None:
        """Take back a stream."""
        self._streams.pop(suffix).abandon()
        self._temporary.pop(suffix).unlink()

    def commit(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Close and rename all files, PREFIX.json last; returns its content: `meta` and `files` (bytes, sha256)."""
        digests = {suffix: stream.close() for suffix, stream in self._streams.items()}
        for part, writer in self._writers.items():
            writer.close()
            digests |= {f"{part}{kind}": digest for kind, digest in writer.digests.items()}
        meta = {**meta, "files": dict(sorted(digests.items()))}
        last = self.stream(".json")
        last.write(seal(meta))
        last.close()
        for suffix in reversed(self.suffixes):  # an older set stops being whole before any of its parts changes
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for suffix in (*sorted(digests), ".json"):
            os.replace(self._temporary[suffix], f"{self.prefix}{suffix}")
        directory = os.open(self.prefix.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        return meta

    def __enter__(self) -> OutputSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.abandon()
        for stream in self._streams.values():
            stream.abandon()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
