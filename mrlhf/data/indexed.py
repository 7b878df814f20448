"""Megatron's indexed datasets (.bin/.idx), read with numpy alone (writer.py writes them).

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
from typing import Any

import msgspec
import numpy as np

from mrlhf.errors import DataError

FORMAT_VERSION = 1
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype] = {1: np.dtype("uint8"), 4: np.dtype("int32"), 7: np.dtype("float32"), 8: np.dtype("uint16")}
CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_REMAKE = "make the data again with tools/preprocess_data.py --overwrite"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (Megatron's own limit), else int32."""
    return np.dtype("uint16") if vocab_size < 65500 else np.dtype("int32")


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
        if len(raw) < HEADER.size or raw[:9] != MAGIC:
            raise DataError("not a Megatron index file", where=idx_path, expected="the magic bytes MMIDIDX", fix=_REMAKE)
        _, version, code, sequences, indices = HEADER.unpack_from(raw)
        if version != 1 or code not in _CODES:
            raise DataError(
                f"index version {version} with data type code {code} is not supported",
                where=idx_path,
                expected=f"version 1 and one of {', '.join(f'{c} ({d.name})' for c, d in _CODES.items())}",
                fix=_REMAKE,
            )
        expected = HEADER.size + 12 * sequences + 8 * indices
        if len(raw) != expected:
            raise DataError(
                f"index has {len(raw):,} bytes, its header promises {expected:,}: truncated or damaged", where=idx_path, fix=_REMAKE
            )
        self.dtype = _CODES[code]
        self.lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
        pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
        self.doc_index = np.frombuffer(raw, "<i8", indices, HEADER.size + 12 * sequences)

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
