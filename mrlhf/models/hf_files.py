"""HF directories: reads slices of safetensors, writes whole tensors, and copies config and tokenizer unchanged."""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from mrlhf.config.foreign import AGAIN, check_links, parse_json, read_json
from mrlhf.errors import CheckpointError
from mrlhf.models.families import end_matrices, hf_tensors, spec_from_hf
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.models.safetensors_header import INDEX, SINGLE, Entry, Index, are_contiguous, open_files, parse_header

log = logging.getLogger(__name__)
HEADERS = "safetensors.headers.json"  # in a checkpoint's hf/: headers and index of the files it was converted from
_HARMLESS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # unused buffers of older releases
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_FROM_HUB = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE"]


def resolve_hf(path: str) -> Path:
    """The local directory, or the download of a hub id. Raises CheckpointError."""
    if Path(path).is_dir():
        return Path(path)
    expected = "a HF directory, a mrlhf checkpoint or a hub id"
    if path.count("/") > 1 or path.startswith((".", "/")) or not path:
        raise CheckpointError(f"no such directory: {path!r}", expected=expected)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=_FROM_HUB))
    except Exception as error:  # the hub client has no common base class for network and not-found errors
        what = f"no such directory, and the hub does not give it: {path!r} ({type(error).__name__})"
        raise CheckpointError(what, expected=expected) from error


class _Headers(msgspec.Struct):
    """HEADERS: the text of the index, and of each file's header."""

    index: str | None = None
    files: dict[str, str] = {}


class HFReader:
    """Reads slices of the tensors in a HF directory; only the slice is in memory (for columns: the whole tensor)."""

    def __init__(self, directory: Path, spec: ModelSpec, *, head: str) -> None:
        """Raises CheckpointError unless the directory has exactly the model's tensors, with their shapes."""
        self.directory = directory
        self.tensors = hf_tensors(spec, head=head)
        files, self.headers = open_files(directory)
        prefix, (embedding, lm_head) = missing_prefix(files, self.tensors), end_matrices(spec)
        self._stored = {prefix + name if prefix + name in self.tensors else name: name for name in files}
        if spec.tied and lm_head in self._stored and embedding not in self._stored:  # either name holds the one matrix
            self._stored[embedding] = self._stored.pop(lm_head)
        self.files = {name: files[stored] for name, stored in self._stored.items()}
        self._fds: dict[str, int] = {}
        self._check_tensors(spec)

    def _check_tensors(self, spec: ModelSpec) -> None:
        entries = {n: self._entry(n) for n in self.tensors if n in self.files}
        shapes = {n: (e.shape, self.tensors[n].stored_shape) for n, e in entries.items()}
        unknown = set(self.files) - set(self.tensors) - ({end_matrices(spec)[1]} if spec.tied else set())
        problems = {
            "missing": set(self.tensors) - set(entries),
            "not known": {n for n in unknown if not n.endswith(_HARMLESS)},
            "of another shape": {f"{n} {has} instead of {wants}" for n, (has, wants) in shapes.items() if has != wants},
            "of a type not read here": {f"{n} {e.type}" for n, e in entries.items() if e.type not in _TYPES},
        }
        texts = [
            f"{what}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in problems.items() if names
        ]
        if texts:
            raise CheckpointError("tensors do not fit config.json: " + "; ".join(texts), where=str(self.directory))

    def _entry(self, name: str) -> Entry:
        return self.headers[self.files[name]].tensors[self._stored[name]]

    def dtype(self, name: str) -> torch.dtype:
        return _TYPES[self._entry(name).type]

    def nbytes(self, name: str) -> int:
        return self._entry(name).stop - self._entry(name).start

    def _rows(self, name: str, start: int, length: int, out: torch.Tensor | None = None) -> torch.Tensor:
        entry, file = self._entry(name), self.files[name]
        if file not in self._fds:
            self._fds[file] = os.open(self.directory / file, os.O_RDONLY)
        if out is None:
            out = torch.empty((length, *entry.shape[1:]), dtype=_TYPES[entry.type])
        first = entry.start + start * math.prod(entry.shape[1:]) * out.element_size()
        view, done = memory_of(out), 0
        while done < len(view):
            count = os.preadv(self._fds[file], [view[done:]], first + done)
            if count <= 0:
                raise CheckpointError(f"ends inside {name}", where=str(self.directory / file), fix=AGAIN)
            done += count
        return out

    def read(self, part: TensorSlice) -> torch.Tensor:
        """The slice as [out, in] in the file's dtype. Raises CheckpointError if it is not finite: a bit has flipped."""
        transposed = self.tensors[part.hf].transposed
        if part.dim == (1 if transposed else 0):
            values = self._rows(part.hf, part.start, part.length)
        else:
            whole = self._rows(part.hf, 0, self._entry(part.hf).shape[0])
            values = whole.narrow(1, part.start, part.length)
        self._check_finite(part.hf, values)
        return values.t() if transposed else values

    def read_into(self, part: TensorSlice, out: torch.Tensor) -> None:
        """Like `read`, into `out`; straight from the file if the bytes are the same."""
        tensor = self.tensors[part.hf]
        whole_rows = not tensor.transposed and (part.dim == 0 or part.length == tensor.shape[1])
        if whole_rows and out.is_contiguous() and out.dtype == self.dtype(part.hf):
            first, length = (part.start, part.length) if part.dim == 0 else (0, out.size(0))
            self._rows(part.hf, first, length, out)
            self._check_finite(part.hf, out)
        else:
            out.copy_(self.read(part))

    def _check_finite(self, name: str, values: torch.Tensor) -> None:
        # the sum is 50 times as fast; where it overflows, every value is looked at
        if not torch.isfinite(values.sum()) and not values.isfinite().all():
            where = str(self.directory / self.files[name])
            raise CheckpointError(f"{name} has values that are not finite", where=where, fix=AGAIN)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def untie(directory: Path, spec: ModelSpec) -> ModelSpec:
    """The spec of a HF directory's LM: untied if config.json ties it, but the files hold two different matrices.

    transformers then keeps both. Raises CheckpointError if the matrices differ in shape, or a file is damaged.
    """
    files = [directory / name for name in (INDEX, SINGLE) if (directory / name).is_file()]
    if not spec.tied or not files:
        return spec
    return replace(spec, tied=_equal_ends(directory, spec, tuple(f.stat().st_mtime_ns for f in files)))


@functools.lru_cache(maxsize=8)
def _equal_ends(directory: Path, spec: ModelSpec, _changed: tuple[int, ...]) -> bool:
    """Whether embedding and LM head are equal, or the files hold only one of them."""
    ends = end_matrices(spec)
    stored = open_files(directory)[0]
    if not all(name in stored or name.partition(".")[2] in stored for name in ends):
        return True
    reader, rows = HFReader(directory, replace(spec, tied=False), head="lm"), 1 + (1 << 24) // spec.hidden_size
    for first in range(0, spec.vocab_size, rows):
        parts = [reader._rows(name, first, min(rows, spec.vocab_size - first)).float() for name in ends]
        if not torch.equal(*parts):
            log.info(f"{directory}: tie_word_embeddings is true, but embedding and {ends[1]} differ: both are kept, as "
                     "transformers does, and checkpoints say tie_word_embeddings: false")
            return False
    reader.close()
    return True


def missing_prefix(stored: Iterable[str], tensors: Iterable[str]) -> str:
    """The prefix that the stored names lack, e.g. "transformer." if GPT-2 was saved without its head; else ""."""
    stored, tensors = set(stored), list(tensors)
    prefix = tensors[0].split(".")[0] + "."
    is_bare = all(n.removeprefix(prefix) in stored and not (n.startswith(prefix) and n in stored) for n in tensors)
    return prefix if is_bare else ""


_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_SIDE_NAMES = ("README.md", "LICENSE", "NOTICE", "USE_POLICY.md")
_SIDE_BYTES = 1 << 30  # each checkpoint has a copy


def side_files(directory: Path) -> list[Path]:
    """Every small file without weights: config, tokenizer, chat template, licence, ...

    Raises CheckpointError for one that is a link out of the directory, or is not small.
    """
    wanted = [f for f in sorted(directory.iterdir()) if f.suffix in _SIDE_SUFFIXES or f.name in _SIDE_NAMES]
    files = [f for f in wanted if f.is_file() and not f.name.endswith(".index.json")]
    check_links(directory, files)
    for file in files:
        if file.stat().st_size > _SIDE_BYTES:
            what = f"{file.stat().st_size:,} bytes, which every checkpoint would hold"
            raise CheckpointError(what, where=str(file), expected=f"at most {_SIDE_BYTES:,}",
                                  fix="move it out of the directory")
    return files


def copy_side_files(source: Path, target: Path, *, headers: bool = True) -> None:
    """Copies the side files byte for byte; config.json says what `untie` found.

    headers: also write HEADERS, which lets an export divide the weights into the same files; False: do not copy it.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in side_files(source):
        if headers or file.name != HEADERS:
            shutil.copyfile(file, target / file.name)
    if headers and ((source / INDEX).is_file() or (source / SINGLE).is_file()):
        _, file_headers = open_files(source)
        index = (source / INDEX).read_text(encoding="utf-8") if (source / INDEX).is_file() else None
        note = {"index": index, "files": {file: header.raw for file, header in file_headers.items()}}
        (target / HEADERS).write_text(json.dumps(note) + "\n")
        config = read_hf_config(source)
        spec = spec_from_hf(config, where=str(source / "config.json"))
        if not is_value_model(config) and untie(source, spec) != spec:
            text = json.dumps(config | {"tie_word_embeddings": False}, indent=2, ensure_ascii=False)
            (target / "config.json").write_text(text + "\n")


def is_value_model(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a value model; other classes are LMs."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


@dataclass(frozen=True)
class OutputFile:
    """A planned safetensors file: its header with the eight bytes of its length, and name -> (first byte, bytes)."""

    name: str
    header: bytes
    places: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        return len(self.header) + sum(nbytes for _, nbytes in self.places.values())


Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> dtype and shape in the file


def plan_output(tensors: Tensors, hf_dir: Path, *, shard_bytes: int = 5 << 30) -> tuple[list[OutputFile], str | None]:
    """(files, text of the index or None for a single file).

    The files are those in `hf_dir`'s HEADERS if they hold the same tensors, else new ones of at most `shard_bytes`.
    Raises CheckpointError if HEADERS names a file in another directory.
    """
    path, note = hf_dir / HEADERS, _Headers()
    if path.is_file():
        note = read_json(path, _Headers)
    outside = [file for file in note.files if Path(file).name != file or not file.endswith(".safetensors")]
    if outside:
        raise CheckpointError(f"it names a file outside the output: {outside[0]!r}", where=str(path))
    texts = {file: parse_header(raw, str(path)) for file, raw in note.files.items()}
    noted = {name: entry for _, text in texts.values() for name, entry in text.items()}
    prefix = missing_prefix(noted, tensors)
    if prefix:
        bare = {name.removeprefix(prefix): stored for name, stored in tensors.items()}
        files, index = plan_output(bare, hf_dir, shard_bytes=shard_bytes)
        whole_name = {name.removeprefix(prefix): name for name in tensors}
        return [replace(f, places={whole_name[n]: place for n, place in f.places.items()}) for f in files], index
    if set(noted) != set(tensors):
        return _plan_new_files(tensors, shard_bytes)
    wanted = {name: (_CODES[dtype], list(shape)) for name, (dtype, shape) in tensors.items()}
    same = all(are_contiguous(text.values()) for _, text in texts.values())
    same &= wanted == {name: (entry.dtype, entry.shape) for name, entry in noted.items()}
    files = []
    for file, (meta, text) in texts.items():
        names = sorted(text, key=lambda n: text[n].data_offsets)
        files.append(_output_file(file, names, tensors, meta, raw=note.files[file] if same else None))
    index = note.index
    if index is not None and not same:
        changed = parse_json(index, where=str(path))
        if "total_size" in parse_json(index, Index, where=str(path)).metadata:
            changed["metadata"]["total_size"] = sum(_nbytes(*stored) for stored in tensors.values())
        index = json.dumps(changed, indent=2) + "\n"
    return files, index


def _plan_new_files(tensors: Tensors, shard_bytes: int) -> tuple[list[OutputFile], str | None]:
    shards, size = [list[str]()], 0
    for name, stored in tensors.items():
        if shards[-1] and size + _nbytes(*stored) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(*stored)
    meta, count = {"format": "pt"}, len(shards)
    if count == 1:
        return [_output_file(SINGLE, shards[0], tensors, meta)], None
    file_names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = [_output_file(file, names, tensors, meta) for file, names in zip(file_names, shards, strict=True)]
    total = sum(_nbytes(*stored) for stored in tensors.values())
    weight_map = dict(sorted((name, file.name) for file in files for name in file.places))
    return files, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _output_file(
    file: str, names: list[str], tensors: Tensors, meta: Mapping[str, str], *, raw: str | None = None
) -> OutputFile:
    if raw is None:
        names = sorted(names, key=lambda n: -tensors[n][0].itemsize)  # so that every tensor is aligned
        at, entries = 0, {}
        for name in names:
            dtype, shape = tensors[name]
            end = at + _nbytes(dtype, shape)
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps({"__metadata__": meta, **entries}, separators=(",", ":"))
        raw += " " * (-len(raw.encode()) % 8)
    text = raw.encode()
    start = 8 + len(text)
    header = json.loads(raw)
    places = {n: (start + header[n]["data_offsets"][0], _nbytes(*tensors[n])) for n in names}
    return OutputFile(file, len(text).to_bytes(8, "little") + text, places)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host. `numpy()` would fix the size of its storage, and offload.* shrinks
    those of models and optimizers."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]  # alive as long as the view
    return memoryview(memory).cast("B")


def write_from(fd: int, start: int, data: Any, what: str = "") -> int:
    """Writes all of `data` (bytes-like, called `what` in errors) at byte `start`; returns its length.

    Raises CheckpointError if the disk is full.
    """
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(fd, data[done:], start + done)
    except OSError as error:
        text = f"{what} cannot be written: {error.strerror}".lstrip()
        raise CheckpointError(text, where=os.readlink(f"/proc/self/fd/{fd}")) from error
    return done


def to_disk(fd: int) -> None:
    """Flushes a file to the disk and out of the page cache, where a large model would displace everything else.

    The next write then reuses these pages: on a virtual machine that takes a third of the time of fresh ones.
    """
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class HFWriter:
    """Writes whole tensors to their places in the planned files, in any order and from several processes."""

    def __init__(self, directory: Path, files: list[OutputFile]) -> None:
        self.directory = directory
        self._places = {name: (file.name, at, nbytes) for file in files for name, (at, nbytes) in file.places.items()}
        self._fds: dict[str, int] = {}

    @staticmethod
    def create(directory: Path, files: list[OutputFile]) -> None:
        """Creates the files at their full size with their headers; only one process may call it."""
        for file in files:
            with (directory / file.name).open("r+b" if (directory / file.name).is_file() else "wb") as f:
                f.truncate(file.size)  # not fallocate: writing into reserved blocks took 2-4 times as long (ext4)
                f.write(file.header)

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Writes a tensor in its stored form; returns its size in bytes. Raises CheckpointError if the disk is full."""
        file, at, nbytes = self._places[name]
        if file not in self._fds:
            self._fds[file] = os.open(self.directory / file, os.O_WRONLY)
        data = memory_of(tensor.contiguous())
        assert len(data) == nbytes, (name, len(data), nbytes)
        return write_from(self._fds[file], at, data, name)

    def sync(self) -> None:
        for fd in list(self._fds.values()):  # another thread may open one more
            to_disk(fd)

    def close(self) -> None:
        self.sync()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
