"""Megatron's indexed datasets (.bin/.idx), read with numpy alone (writer.py writes them).

A *sequence* is one sample, a *document* is one pack. A set of files with one PREFIX is

    PREFIX.bin/.idx             token ids (uint16 or int32)
    PREFIX_loss_mask.bin/.idx   uint8, the same sequences and documents; absent for prompts
    PREFIX_margin.bin/.idx      float32, one number a pair, a document per pack; preference data with margins only
    PREFIX_labels.jsonl         one JSON value a prompt; prompts only
    PREFIX.json                 metadata; written last, so where it exists the set is whole

.idx: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 number of sequences,
u64 number of document indices (documents + 1), int32 lengths [sequences], int64 byte offsets [sequences],
int64 document indices [documents + 1]. Little-endian.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import re
import shlex
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from mrlhf.config.foreign import parse_json, typed
from mrlhf.errors import DataError

FORMAT_VERSION = 1
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype] = dict(
    enumerate(map(np.dtype, ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")), start=1)
)
_ANY = tuple(_CODES[code].name for code in _CODES)
_TOKENS, _MASK, _MARGIN = ("uint16", "int32"), ("uint8",), ("float32",)  # data types of the parts of a set
_CHUNK = 1 << 20  # entries of an index checked at once, which takes little memory
CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_SEAL = re.compile(rb'"seal": ?"([0-9a-f]{64})"')
_REMAKE = "make the data again: python tools/preprocess_data.py --overwrite ..."


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (Megatron's own limit), else int32."""
    return np.dtype("uint16") if vocab_size < 65500 else np.dtype("int32")


def seal(meta: dict[str, Any]) -> bytes:
    """The text of PREFIX.json: `meta` and, under "seal", the SHA-256 of that text with zeros in place of the seal."""
    text = msgspec.json.format(msgspec.json.encode({**meta, "seal": "0" * 64}), indent=1) + b"\n"
    return _SEAL.sub(b'"seal": "%s"' % hashlib.sha256(text).hexdigest().encode(), text)


def _is_sealed(text: bytes) -> bool:
    """False where any byte of PREFIX.json has changed."""
    match = _SEAL.search(text)
    if match is None:
        return False
    blank = text[: match.start(1)] + b"0" * 64 + text[match.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == match.group(1)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _mapped(path: str) -> np.ndarray:
    """The bytes of a file that is not empty, memory-mapped, read-only: uint8 [bytes]. Raises DataError.

    np.memmap would keep a file descriptor as long as the array lives: four for each source of a blend.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address in (None, ctypes.c_void_p(-1).value):
        reason = os.strerror(ctypes.get_errno())
        raise DataError(f"cannot be mapped into memory: {reason}", where=path,
                        fix="sysctl vm.max_map_count=1000000 for a blend of very many sources; a higher ulimit -v")
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, size).atexit = False  # arrays may still be read at exit
    array = np.ctypeslib.as_array(buffer)
    array.flags.writeable = False
    return array


class IndexedReader:
    """One .bin/.idx pair, memory-mapped. Keeps no file open.

    lengths     int32 [sequences]
    doc_index   int64 [documents + 1]

    `dtypes`: the accepted data types. `empty`: accept sequences and documents without a token, which Megatron writes.
    Opening reads the index once (20 bytes a sequence) in chunks and copies nothing. Raises DataError.
    """

    def __init__(self, prefix: str, *, dtypes: Sequence[str] = _ANY, empty: bool = False):
        bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
        for path in (bin_path, idx_path):
            if not os.path.isfile(path):
                raise DataError("file is missing", where=path, fix=f"copy it here, or {_REMAKE}")
        self.dtype, sequences, indices = self._read_header(idx_path, dtypes)
        index = _mapped(idx_path)
        self.lengths = np.ndarray(sequences, "<i4", index, HEADER.size)
        self._pointers = np.ndarray(sequences, "<i8", index, HEADER.size + 4 * sequences)
        self.doc_index = np.ndarray(indices, "<i8", index, HEADER.size + 12 * sequences)
        self.num_tokens = self._check_index(idx_path, least=0 if empty else 1)
        size, wanted = os.path.getsize(bin_path), self.num_tokens * self.dtype.itemsize
        if size != wanted:
            state = "truncated" if size < wanted else "damaged"
            raise DataError(f"file has {size:,} bytes, its index promises {wanted:,}: {state}", where=bin_path,
                            fix=f"copy it again, or {_REMAKE}")
        little_endian = self.dtype.newbyteorder("<")
        self._values = _mapped(bin_path).view(little_endian) if size else np.empty(0, self.dtype)

    @staticmethod
    def _read_header(idx_path: str, dtypes: Sequence[str]) -> tuple[np.dtype, int, int]:
        """The data type and the numbers of sequences and of document indices, which the file's size must fit."""
        with open(idx_path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise DataError("not a Megatron index file", where=idx_path, expected="the bytes MMIDIDX", fix=_REMAKE)
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != 1 or code not in _CODES or _CODES[code].name not in dtypes:
            readable = ", ".join(f"{c} ({d.name})" for c, d in _CODES.items() if d.name in dtypes)
            raise DataError(f"index version {version} with data type code {code} is not supported", where=idx_path,
                            expected=f"version 1 and one of {readable}", fix=_REMAKE)
        size, expected = os.path.getsize(idx_path), HEADER.size + 12 * sequences + 8 * indices
        if size != expected:
            raise DataError(f"index has {size:,} bytes, its header promises {expected:,}: truncated or damaged",
                            where=idx_path, fix=_REMAKE)
        if not sequences or not indices:
            raise DataError("index of no sequences", where=idx_path, fix=_REMAKE)
        return _CODES[code], sequences, indices

    def _check_index(self, idx_path: str, *, least: int) -> int:
        """Total length of the sequences. DataError where the index contradicts itself."""
        end, sound = 0, self.doc_index[0] == 0 and self.doc_index[-1] == len(self.lengths)
        for at in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[at : at + _CHUNK].astype(np.int64)
            ends = end + np.cumsum(lengths)
            offsets = (ends - lengths) * self.dtype.itemsize
            sound &= lengths.min() >= least and np.array_equal(self._pointers[at : at + _CHUNK], offsets)
            end = int(ends[-1])
        for at in range(0, len(self.doc_index) - 1, _CHUNK):
            sound &= np.diff(self.doc_index[at : at + _CHUNK + 1]).min() >= least
        if not sound:
            raise DataError("lengths, byte offsets and document indices contradict each other: damaged", where=idx_path,
                            fix=_REMAKE)
        return end

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """Sequence i, a view of the file [lengths[i]]."""
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"sequence {i} of {len(self.lengths)}")
        start = self.start(i)
        return self._values[start : start + self.lengths[i]]

    def start(self, i: int) -> int:
        """Index of the first token of sequence i in the .bin; for i = len(self), the number of tokens."""
        return int(self._pointers[i]) // self.dtype.itemsize if i < len(self.lengths) else self.num_tokens

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """`start` for many sequences: int64, the shape of `indices`."""
        inside = self._pointers[np.minimum(indices, len(self.lengths) - 1)] // self.dtype.itemsize
        return np.where(indices < len(self.lengths), inside, self.num_tokens)

    def span(self, start: int, end: int) -> np.ndarray:
        """Tokens start .. end - 1 of the .bin, a view of the file."""
        return self._values[start:end]


def _agree(test: Callable[..., np.ndarray | np.bool], *arrays: np.ndarray) -> bool:
    """Whether the arrays have one length and pass `test` everywhere. Tests slices, which takes little memory."""
    if len({len(a) for a in arrays}) > 1:
        return False
    return all(bool(np.all(test(*(a[at : at + _CHUNK] for a in arrays)))) for at in range(0, len(arrays[0]), _CHUNK))


class PackedDataset:
    """A set written by tools/preprocess_data.py: samples grouped in packs. Open with `PackedDataset.open(prefix)`.

    meta         dict, the content of PREFIX.json
    task         "pretrain", "sft", "preference" or "prompts"
    num_packs    number of documents
    num_samples  number of sequences (preference: chosen, rejected, chosen, rejected, ... inside each pack)
    num_tokens   tokens of all samples; max_length: tokens of the longest
    lengths      int32 [num_samples], tokens a sample
    doc_index    int64 [num_packs + 1]; the samples of pack i are doc_index[i] .. doc_index[i + 1] - 1
    has_mask     false for prompts

    Opening costs one pass over the indices (20 bytes a sample each) and finds every changed byte in them and in
    PREFIX.json. Tokens and indices stay on the disk until they are read. Whatever is read of them is checked: `tokens`,
    `mask` and `margin` raise DataError for a value that sound data cannot hold.
    """

    def __init__(self, prefix: str, meta: dict[str, Any], ids: IndexedReader, mask: IndexedReader | None,
                 margin: IndexedReader | None):
        self.prefix, self.meta = prefix, meta
        self.task: str = meta["task"]
        self._ids, self._mask, self._margin = ids, mask, margin
        self.lengths = ids.lengths
        self.doc_index = ids.doc_index
        self.num_samples = len(ids)
        self.num_packs = len(ids.doc_index) - 1
        self.num_tokens = ids.num_tokens
        self.max_length = int(ids.lengths.max())
        self._id_limit: int = meta.get("vocab_size", 1 << 63)

    @classmethod
    def open(cls, prefix: str | Path, *, verify: bool = False) -> PackedDataset:
        """Open PREFIX. Checks that all files exist, have the sizes that the indices promise, and agree with each other.

        `verify` also reads all files and compares their SHA-256 with PREFIX.json. Raises DataError.
        """
        prefix = str(prefix)
        meta = read_meta(prefix)
        files = meta["files"]
        for problem in file_problems(prefix, meta, verify=verify):
            raise problem
        ids = IndexedReader(prefix, dtypes=_TOKENS)
        mask = IndexedReader(prefix + "_loss_mask", dtypes=_MASK) if "_loss_mask.bin" in files else None
        margin = IndexedReader(prefix + "_margin", dtypes=_MARGIN) if "_margin.bin" in files else None
        whole = {"num_samples": meta["num_samples"] == len(ids),
                 "num_packs": meta["num_packs"] == len(ids.doc_index) - 1}
        if mask is not None:
            whole["sample lengths"] = _agree(np.equal, ids.lengths, mask.lengths)
            whole["packs"] = _agree(np.equal, ids.doc_index, mask.doc_index)
        if meta["task"] == "preference":
            whole["pairs"] = _agree(lambda index: index % 2 == 0, ids.doc_index)
        if margin is not None:
            whole["margins"] = _agree(lambda a, b: a == 2 * b, ids.doc_index, margin.doc_index)
        for name, agrees in whole.items():
            if not agrees:
                what = f"{name} of {prefix}{{.idx,.json}} and its siblings disagree"
                raise DataError(f"{what}: files of different runs, or a damaged index", where=prefix, fix=_REMAKE)
        return cls(prefix, meta, ids, mask, margin)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return PackedDataset.open, (self.prefix,)  # a worker process maps the files instead of receiving their content

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    def block(self, first_pack: int, end_pack: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Consecutive packs as views of the files: ids [T], mask [T] (None for prompts), lengths of the samples."""
        first, end = int(self.doc_index[first_pack]), int(self.doc_index[end_pack])
        span = self._ids.start(first), self._ids.start(end)
        return self._ids.span(*span), None if self._mask is None else self._mask.span(*span), self.lengths[first:end]

    @property
    def identity(self) -> str:
        """SHA-256 over the checksums of the files. Copies of the data share it; any change of the data changes it."""
        return hashlib.sha256(msgspec.json.encode(self.meta["files"], order="sorted")).hexdigest()

    def sample(self, i: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(i, tokens, mask); the mask of a prompt is zero: nothing in it is trained."""
        return i, self.tokens(i), self.mask(i) if self.has_mask else np.zeros(self.lengths[i], np.uint8)

    def pack(self, row: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The samples of one pack."""
        return [self.sample(i) for i in range(int(self.doc_index[row]), int(self.doc_index[row + 1]))]

    def row_lengths(self, row: int, *, packing: bool) -> list[int]:
        """Tokens of the samples of one row: a pack's, or with `packing` false a sample's or both of a pair's."""
        group = 2 if self.task == "preference" else 1
        first, end = self.doc_index[row : row + 2].tolist() if packing else (row * group, (row + 1) * group)
        return self.lengths[first:end].tolist()

    def longest_row(self, *, packing: bool) -> list[int]:
        """Lengths of the row with the most tokens, padding included. Packed: reads the lengths of all samples."""
        if packing:
            return self.row_lengths(int(np.add.reduceat(self.lengths, self.doc_index[:-1]).argmax()), packing=True)
        return [self.max_length] * (2 if self.task == "preference" else 1)

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of sample i: int64 [lengths[i]], a copy."""
        tokens = self._ids[i].astype(np.int64)
        if int(tokens.view(np.uint64).max()) >= self._id_limit:  # a negative id is a very large unsigned number
            wrong = (tokens < 0) | (tokens >= self._id_limit)
            raise self._damaged("", "token id", tokens, wrong, i, f"ids of the tokenizer, 0 to {self._id_limit - 1:,}")
        return tokens

    def mask(self, i: int) -> np.ndarray:
        """Loss mask of sample i: uint8 [lengths[i]], 1 for a trained token; a copy. Raises DataError for prompts."""
        if self._mask is None:
            raise DataError(f"{self.task} data has no loss mask", where=self.prefix,
                            expected="pretrain, sft or preference data")
        mask = np.array(self._mask[i])
        if mask.max() > 1:
            raise self._damaged("_loss_mask", "mask value", mask, mask > 1, i, "0 or 1")
        return mask

    def _damaged(self, part: str, name: str, values: np.ndarray, wrong: np.ndarray, i: int, expected: str) -> DataError:
        at = int(np.flatnonzero(wrong)[0])
        return DataError(f"{name} {values[at]} at token {at:,} of sample {i:,}: the file is damaged",
                         where=f"{self.prefix}{part}.bin", expected=expected, fix=self._fix)

    @property
    def _fix(self) -> str:
        return f"copy it again, or {_REMAKE}; mrlhf data {shlex.quote(self.prefix)} --check shows all damage"

    def margin(self, pair_index: int) -> float | None:
        """Margin of pair `pair_index` (samples 2 * pair_index and the next), None where the data has no margins."""
        if self._margin is None:
            return None
        value = float(self._margin[pair_index][0])
        if not math.isfinite(value):
            raise DataError(f"margin {value} of pair {pair_index:,}: the file is damaged",
                            where=f"{self.prefix}_margin.bin", expected="a finite number", fix=self._fix)
        return value

    @property
    def margins(self) -> np.ndarray | None:
        """float32 [pairs], a view of the file; None where the data has none."""
        return None if self._margin is None else self._margin.span(0, len(self._margin))

    def label(self, i: int) -> Any:
        """The parsed JSON value that goes with prompt i, None where there is none."""
        return self._labels[i] if self._labels else None

    @cached_property
    def _labels(self) -> list[Any]:
        if "_labels.jsonl" not in self.meta["files"]:
            return []
        path = Path(self.prefix + "_labels.jsonl")
        labels: list[Any] = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                labels.append(msgspec.json.decode(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"not JSON: {error}: the file is damaged", where=f"{path}:{number}",
                                fix=f"copy it again, or {_REMAKE}") from error
        if len(labels) != self.num_samples:
            raise DataError(f"{len(labels)} labels for {self.num_samples} prompts", where=str(path), fix=_REMAKE)
        return labels


def file_problems(prefix: str, meta: dict[str, Any], *, verify: bool) -> Iterator[DataError]:
    """Files that are missing, or differ from PREFIX.json in size or (`verify`) SHA-256."""
    for suffix, digest in meta["files"].items():
        yield from file_problem(prefix, suffix, digest, verify=verify)


def file_problem(prefix: str, suffix: str, digest: dict[str, Any], *, verify: bool) -> Iterator[DataError]:
    """What is wrong with one file of a set; `digest`: its entry in PREFIX.json."""
    path = Path(prefix + suffix)
    if not path.is_file():
        yield DataError("file is missing", where=str(path), fix=f"copy it here, or {_REMAKE}")
    elif path.stat().st_size != digest["bytes"]:
        what = f"file has {path.stat().st_size:,} bytes, {prefix}.json promises {digest['bytes']:,}"
        yield DataError(f"{what}: truncated or of another run", where=str(path), fix=f"copy it again, or {_REMAKE}")
    elif verify and sha256_of(path) != digest["sha256"]:
        yield DataError(f"checksum differs from {prefix}.json: the file is damaged", where=str(path),
                        fix=f"copy it again, or {_REMAKE}")


class _File(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str


class _Meta(msgspec.Struct):
    """Types of the entries that every PREFIX.json has."""

    task: str
    num_samples: Annotated[int, msgspec.Meta(ge=0)]
    num_packs: Annotated[int, msgspec.Meta(ge=0)]
    files: dict[str, _File]


def _from_records(path: str) -> str:
    """The fix for a file of raw records in the place of a data set: it stays as it is."""
    command = f"python tools/preprocess_data.py --input {shlex.quote(path)} --output-prefix NEW ..."
    return f"{command}, then NEW here"


def read_meta(prefix: str) -> dict[str, Any]:
    """The content of PREFIX.json, whose checksum must fit. Raises DataError."""
    path = Path(prefix + ".json")
    if not path.is_file():
        for ending in (".bin", ".idx", ".json"):
            whole = prefix.removesuffix(ending)
            if prefix.endswith(ending) and all(Path(whole + part).is_file() for part in (".json", ".bin")):
                raise DataError(f"{prefix} is a file of the set", where=prefix, expected="the prefix",
                                fix=f"leave out {ending}")
        if Path(prefix + ".bin").exists():
            raise DataError(
                "PREFIX.json is missing: the files were not made by, or not finished by, tools/preprocess_data.py",
                where=str(path),
                expected="its output; data of Megatron-LM's own tool has no loss masks and serves pretraining alone",
                fix="copy it here, or make the data anew: python tools/preprocess_data.py --output-prefix NEW ..., "
                "then NEW here",  # with --overwrite it would replace what may be the only copy of Megatron-LM's text
            )
        if Path(prefix).exists():
            what = "a directory" if Path(prefix).is_dir() else "a file of raw records"
            expected = "a prefix written by tools/preprocess_data.py"
            raise DataError(f"{what}, not a data set", where=prefix, expected=expected,
                            fix=_from_records(prefix))
        raise DataError("no such dataset", where=str(path), expected="a prefix written by tools/preprocess_data.py",
                        fix="--output-prefix of that command")
    text, fix = path.read_bytes(), _REMAKE if Path(prefix + ".bin").is_file() else _from_records(str(path))
    meta: dict[str, Any] = parse_json(text, where=str(path), error=DataError, fix=fix)
    needed = ("format", "task", "num_samples", "num_packs", "files")
    missing = [k for k in needed if k not in meta]
    if missing:
        raise DataError(f"not the metadata of a dataset: {', '.join(missing)} missing", where=str(path), fix=fix)
    if meta["format"] != FORMAT_VERSION:
        raise DataError(f"written in format {meta['format']} by {meta.get('version')}", where=str(path),
                        expected=f"format {FORMAT_VERSION}", fix=_REMAKE)
    if "seal" not in meta:
        raise DataError("it has no checksum of its own: written by an earlier version, or damaged", where=str(path),
                        fix=_REMAKE)
    if not _is_sealed(text):
        raise DataError("checksum differs from its own: the file is damaged or was edited", where=str(path),
                        fix=f"copy it again, or {_REMAKE}")
    typed(meta, _Meta, where=str(path), error=DataError, fix=_REMAKE)
    del meta["seal"]
    return meta


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
