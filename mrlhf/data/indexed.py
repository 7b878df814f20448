"""Megatron's indexed datasets (.bin/.idx), written and read with numpy alone.

A *sequence* is one sample, a *document* is one pack. A set of files with one PREFIX is

    PREFIX.bin/.idx             token ids (uint16 or int32)
    PREFIX_loss_mask.bin/.idx   uint8, the same sequences and documents; absent for prompts
    PREFIX_margin.bin/.idx      float32, one number a pair, a document per pack; preference data with margins only
    PREFIX_labels.jsonl         one JSON value a prompt; prompts only
    PREFIX.json                 metadata; written last, so where it exists the set is whole

.idx: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 number of sequences, u64 number of document indices (documents + 1),
int32 lengths [sequences], int64 byte offsets [sequences], int64 document indices [documents + 1]. Little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np

from mrlhf.errors import DataError

FORMAT_VERSION = 1
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype] = {1: np.dtype("uint8"), 4: np.dtype("int32"), 7: np.dtype("float32"), 8: np.dtype("uint16")}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_REMAKE = "make the data again with tools/preprocess_data.py --overwrite"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (Megatron's own limit), else int32."""
    return np.dtype("uint16") if vocab_size < 65500 else np.dtype("int32")


class IndexedWriter:
    """Appends documents to one .bin as they come and writes the .idx at `close`. Memory: 12 bytes a sequence."""

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._idx_path = idx_path
        self._bin: BinaryIO = open(bin_path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by close() or abandon()
        self._lengths: list[np.ndarray] = []
        self._documents = [0]
        self._bin_hash = hashlib.sha256()
        self.digests: dict[str, dict[str, Any]] = {}

    def add_document(self, values: np.ndarray, lengths: np.ndarray | list[int]) -> None:
        """Append one document: `values` [sum(lengths)], the sequences one after another, and their `lengths`."""
        sizes = np.asarray(lengths, dtype=np.int32)
        if int(sizes.sum(dtype=np.int64)) != len(values):
            raise ValueError(f"{len(values)} values for lengths that sum to {sizes.sum()}")
        data = np.ascontiguousarray(values, dtype=self.dtype.newbyteorder("<")).tobytes()
        self._bin.write(data)
        self._bin_hash.update(data)
        self._lengths.append(sizes)
        self._documents.append(self._documents[-1] + len(sizes))

    def close(self) -> None:
        """Write the index and push both files to the disk; `digests` then holds {".bin": {bytes, sha256}, ".idx": ...}."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        size = self._bin.tell()
        self._bin.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        index = b"".join(
            (
                _HEADER.pack(_MAGIC, 1, _CODE_OF[self.dtype], len(lengths), len(self._documents)),
                lengths.astype("<i4").tobytes(),
                offsets.tobytes(),
                np.asarray(self._documents, dtype="<i8").tobytes(),
            )
        )
        write_synced(self._idx_path, index)
        self.digests = {
            ".bin": {"bytes": size, "sha256": self._bin_hash.hexdigest()},
            ".idx": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        }

    def abandon(self) -> None:
        self._bin.close()


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class OutputSet:
    """The files of one PREFIX under temporary names, renamed together by `commit`, PREFIX.json last.

    Use as a context manager: what is not committed is removed on the way out, and files that were there before stay as they were.
    Raises DataError when the prefix is taken and `overwrite` is false.
    """

    suffixes = (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx", "_margin.bin", "_margin.idx", "_labels.jsonl", ".json")

    def __init__(self, prefix: str | Path, *, overwrite: bool = False):
        self.prefix = Path(prefix)
        if not overwrite:
            self.refuse_existing(self.prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, IndexedWriter] = {}
        self._digests: dict[str, dict[str, Any]] = {}
        self._temporary: dict[str, Path] = {}

    @classmethod
    def refuse_existing(cls, prefix: Path) -> None:
        taken = [f"{prefix.name}{s}" for s in cls.suffixes if Path(f"{prefix}{s}").exists()]
        if taken:
            raise DataError(f"output exists already: {', '.join(taken)}", where=str(prefix), fix="another --output-prefix, or --overwrite")

    def temporary(self, suffix: str) -> Path:
        """The path to write `suffix` to; beside its final place, so that the rename is atomic."""
        return self._temporary.setdefault(suffix, self.prefix.parent / f".{self.prefix.name}{suffix}.{os.getpid()}.tmp")

    def indexed(self, part: str, dtype: np.dtype) -> IndexedWriter:
        """A writer for PREFIX{part}.bin/.idx."""
        self._writers[part] = IndexedWriter(self.temporary(f"{part}.bin"), self.temporary(f"{part}.idx"), dtype)
        return self._writers[part]

    def write(self, suffix: str, data: bytes) -> None:
        write_synced(self.temporary(suffix), data)
        self._digests[suffix] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def commit(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Close, rename, and write PREFIX.json from `meta` plus `files` (bytes and sha256 by suffix), which is returned."""
        for part, writer in self._writers.items():
            writer.close()
            self._digests |= {f"{part}{kind}": digest for kind, digest in writer.digests.items()}
        meta = {**meta, "files": dict(sorted(self._digests.items()))}
        write_synced(self.temporary(".json"), msgspec.json.format(msgspec.json.encode(meta), indent=1) + b"\n")
        for suffix in reversed(self.suffixes):  # an older set stops being whole before any of its parts changes
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for suffix in (*sorted(self._digests), ".json"):
            os.replace(self._temporary[suffix], f"{self.prefix}{suffix}")
        directory = os.open(self.prefix.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        return meta

    def __enter__(self) -> OutputSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.abandon()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


class IndexedReader:
    """One .bin/.idx pair, memory-mapped.

    `lengths` int32 [sequences], `offsets` int64 [sequences] (in items), `doc_index` int64 [documents + 1]. Raises DataError.
    """

    def __init__(self, prefix: str):
        bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
        for path in (bin_path, idx_path):
            if not os.path.isfile(path):
                raise DataError("file is missing", where=path, fix=f"copy it here, or {_REMAKE}")
        raw = Path(idx_path).read_bytes()
        if len(raw) < _HEADER.size or raw[:9] != _MAGIC:
            raise DataError("not a Megatron index file", where=idx_path, expected="the magic bytes MMIDIDX", fix=_REMAKE)
        _, version, code, sequences, indices = _HEADER.unpack_from(raw)
        if version != 1 or code not in _CODES:
            raise DataError(
                f"index version {version} with data type code {code} is not supported",
                where=idx_path,
                expected=f"version 1 and one of {', '.join(f'{c} ({d.name})' for c, d in _CODES.items())}",
                fix=_REMAKE,
            )
        expected = _HEADER.size + 12 * sequences + 8 * indices
        if len(raw) != expected:
            raise DataError(
                f"index has {len(raw):,} bytes, its header promises {expected:,}: truncated or damaged", where=idx_path, fix=_REMAKE
            )
        self.dtype = _CODES[code]
        self.lengths = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
        pointers = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
        self.doc_index = np.frombuffer(raw, "<i8", indices, _HEADER.size + 12 * sequences)

        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.offsets = ends - self.lengths
        sound = (
            sequences > 0
            and bool((self.lengths > 0).all())
            and np.array_equal(pointers, self.offsets * self.dtype.itemsize)
            and indices > 0
            and self.doc_index[0] == 0
            and self.doc_index[-1] == sequences
            and bool((np.diff(self.doc_index) > 0).all())
        )
        if not sound:
            raise DataError(
                "lengths, byte offsets and document indices contradict each other: empty or damaged", where=idx_path, fix=_REMAKE
            )
        size, wanted = os.path.getsize(bin_path), int(ends[-1]) * self.dtype.itemsize
        if size != wanted:
            raise DataError(
                f"file has {size:,} bytes, its index promises {wanted:,}: {'truncated' if size < wanted else 'damaged'}",
                where=bin_path,
                fix=f"copy it again, or {_REMAKE}",
            )
        self._values = np.memmap(bin_path, dtype=self.dtype.newbyteorder("<"), mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sequence i, a view of the file [lengths[i]]."""
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"sequence {i} of {len(self.lengths)}")
        return self._values[self.offsets[i] : self.offsets[i] + self.lengths[i]]


class PackedDataset:
    """What tools/preprocess_data.py wrote: samples grouped in packs. Open with `PackedDataset.open(prefix)`.

    meta         dict, the content of PREFIX.json
    task         "pretrain", "sft", "preference" or "prompts"
    num_packs    documents; num_samples: sequences (preference: chosen, rejected, chosen, rejected, ... inside each pack)
    lengths      int32 [num_samples], tokens a sample
    doc_index    int64 [num_packs + 1]; the samples of pack i are doc_index[i] .. doc_index[i + 1] - 1
    has_mask     false for prompts

    Opening costs one pass over the index (20 bytes a sample); tokens stay on the disk until asked for.
    """

    def __init__(self, prefix: str, meta: dict[str, Any], ids: IndexedReader, mask: IndexedReader | None, margin: IndexedReader | None):
        self.prefix, self.meta = prefix, meta
        self.task: str = meta["task"]
        self._ids, self._mask, self._margin = ids, mask, margin
        self.lengths = ids.lengths
        self.doc_index = ids.doc_index
        self.num_samples = len(ids)
        self.num_packs = len(ids.doc_index) - 1

    @classmethod
    def open(cls, prefix: str | Path, *, verify: bool = False) -> PackedDataset:
        """Open PREFIX after checking that every file is there, has the size its index promises and that the siblings agree.

        `verify` also compares the SHA-256 of every file with PREFIX.json (reads all of it). Raises DataError.
        """
        prefix = str(prefix)
        meta = _read_meta(prefix)
        files = meta["files"]
        for suffix, digest in files.items():
            path = Path(prefix + suffix)
            if not path.is_file():
                raise DataError("file is missing", where=str(path), fix=f"copy it here, or {_REMAKE}")
            if path.stat().st_size != digest["bytes"]:
                raise DataError(
                    f"file has {path.stat().st_size:,} bytes, {prefix}.json promises {digest['bytes']:,}: truncated or of another run",
                    where=str(path),
                    fix=f"copy it again, or {_REMAKE}",
                )
            if verify and _sha256(path) != digest["sha256"]:
                raise DataError(
                    f"checksum differs from {prefix}.json: the file is damaged", where=str(path), fix=f"copy it again, or {_REMAKE}"
                )
        ids = IndexedReader(prefix)
        mask = IndexedReader(prefix + "_loss_mask") if "_loss_mask.bin" in files else None
        margin = IndexedReader(prefix + "_margin") if "_margin.bin" in files else None

        def same(name: str, ours: Any, theirs: Any) -> None:
            if not np.array_equal(ours, theirs):
                raise DataError(
                    f"{name} of {prefix}{{.idx,.json}} and its siblings disagree: files of different runs", where=prefix, fix=_REMAKE
                )

        same("num_samples", meta["num_samples"], len(ids))
        same("num_packs", meta["num_packs"], len(ids.doc_index) - 1)
        if mask is not None:
            same("sample lengths", ids.lengths, mask.lengths)
            same("packs", ids.doc_index, mask.doc_index)
        if meta["task"] == "preference":
            same("pairs", ids.doc_index % 2, np.zeros_like(ids.doc_index))
        if margin is not None:
            same("pairs", ids.doc_index, margin.doc_index * 2)
        return cls(prefix, meta, ids, mask, margin)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return PackedDataset.open, (self.prefix,)  # a worker process maps the files anew instead of receiving their content

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of sample i: int64 [lengths[i]], a copy."""
        return self._ids[i].astype(np.int64)

    def mask(self, i: int) -> np.ndarray:
        """Loss mask of sample i: uint8 [lengths[i]], 1 where that token is trained; a copy. DataError for prompts, which have none."""
        if self._mask is None:
            raise DataError(f"{self.task} data has no loss mask", where=self.prefix, expected="pretrain, sft or preference data")
        return np.array(self._mask[i])

    def margin(self, pair_index: int) -> float | None:
        """Margin of pair `pair_index` (samples 2 * pair_index and the next), None where the data has no margins."""
        return None if self._margin is None else float(self._margin[pair_index][0])

    def label(self, i: int) -> Any:
        """The parsed JSON value that goes with prompt i, None where there is none."""
        return self._labels[i] if self._labels else None

    @cached_property
    def _labels(self) -> list[Any]:
        if "_labels.jsonl" not in self.meta["files"]:
            return []
        path = Path(self.prefix + "_labels.jsonl")
        labels = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        if len(labels) != self.num_samples:
            raise DataError(f"{len(labels)} labels for {self.num_samples} prompts", where=str(path), fix=_REMAKE)
        return labels


def _read_meta(prefix: str) -> dict[str, Any]:
    path = Path(prefix + ".json")
    if not path.is_file():
        for ending in (".bin", ".idx", ".json"):
            if prefix.endswith(ending) and Path(prefix.removesuffix(ending) + ".json").is_file():
                raise DataError(f"{prefix} is a file of the set", where=prefix, expected="the prefix", fix=f"leave out {ending}")
        if Path(prefix + ".bin").exists():
            raise DataError(
                "PREFIX.json is missing: the files were not made by, or not finished by, tools/preprocess_data.py",
                where=str(path),
                fix=_REMAKE,
            )
        raise DataError(
            "no such dataset",
            where=str(path),
            expected="a prefix written by tools/preprocess_data.py",
            fix="--output-prefix of that command",
        )
    try:
        meta = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not readable as JSON: {error}", where=str(path), fix=_REMAKE) from error
    needed = ("format", "task", "num_samples", "num_packs", "files")
    missing = [k for k in needed if k not in meta] if isinstance(meta, dict) else list(needed)
    if missing:
        raise DataError(f"not the metadata of a dataset: {', '.join(missing)} missing", where=str(path), fix=_REMAKE)
    if meta["format"] != FORMAT_VERSION:
        raise DataError(
            f"written in format {meta['format']} by {meta.get('version')}",
            where=str(path),
            expected=f"format {FORMAT_VERSION}",
            fix=_REMAKE,
        )
    return meta


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
