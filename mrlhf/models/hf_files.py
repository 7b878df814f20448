"""HF directories: safetensors read slice by slice and written tensor by tensor; config and tokenizer travel unchanged."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mrlhf.errors import CheckpointError
from mrlhf.models.families import hf_tensors
from mrlhf.models.families.blocks import Block
from mrlhf.models.families.spec import ModelSpec

HEADERS = "safetensors.headers.json"  # in a checkpoint's hf/: the headers and the index of the files that it came from
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_HARMLESS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that older releases wrote and nobody reads
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
         "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}  # fmt: skip
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_AGAIN = "copy or download the file again"


def resolve_hf(path: str) -> Path:
    """A local directory as it is; anything else is taken for a hub id. Raises CheckpointError."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") > 1 or path.startswith((".", "/")) or not path:
        raise CheckpointError(f"no such directory: {path!r}", expected="a HF directory, a mrlhf checkpoint or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE"])
        )
    except Exception as error:  # the hub client has no common base class for network and not-found errors
        raise CheckpointError(
            f"no such directory, and the hub does not give it: {path!r} ({type(error).__name__})",
            expected="a HF directory, a mrlhf checkpoint or a hub id",
        ) from error


@dataclass(frozen=True)
class Header:
    """Of a safetensors file: its bytes as text, and name -> (type, stored shape, first byte, one past the last byte) counted from the file's start."""

    raw: str
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is not whole: too short, or with a header that does not describe its bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                raise CheckpointError(f"its header would be {length:,} bytes long in a file of {size:,}", where=str(path), fix=_AGAIN)
            raw = f.read(length).decode()
        text = json.loads(raw)
        tensors, end = {}, 0
        for name, entry in text.items():
            if name != "__metadata__":
                shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
                if stop - start != math.prod(shape) * _BITS[entry["dtype"]] // 8 or start < 0 or any(n < 0 for n in shape):
                    raise CheckpointError(f"the header gives {name} {entry}", where=str(path), fix=_AGAIN)
                tensors[name], end = (entry["dtype"], shape, 8 + length + start, 8 + length + stop), max(end, stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {error}", where=str(path), fix=_AGAIN) from error
    if size != 8 + length + end:
        cut = [name for name, (_, _, _, stop) in tensors.items() if stop > size]
        raise CheckpointError(
            f"{size:,} bytes instead of {8 + length + end:,}" + (f": {', '.join(cut[:3])} not whole" if cut else ""),
            where=str(path), fix=_AGAIN,
        )  # fmt: skip
    spans = sorted((start, stop) for _, _, start, stop in tensors.values())
    if any(stop > following for (_, stop), (following, _) in zip(spans, spans[1:], strict=False)):
        raise CheckpointError("tensors overlap", where=str(path), fix=_AGAIN)
    return Header(raw, tensors)


class HFReader:
    """Reads blocks of the tensors of a HF directory; nothing but the block comes into memory (of columns: the tensor)."""

    def __init__(self, directory: Path, spec: ModelSpec, *, head: str) -> None:
        """Raises CheckpointError unless every tensor of the model is there with its shape, and no other, naming both sides."""
        self.directory = directory
        self.tensors = hf_tensors(spec, head=head)
        files, self.headers = open_files(directory)
        self._prefix = left_out_prefix(files, self.tensors)
        self.files = {self._prefix + name if self._prefix + name in self.tensors else name: file for name, file in files.items()}
        self._fds: dict[str, int] = {}
        self._check(spec)

    def _check(self, spec: ModelSpec) -> None:
        unknown = [
            n for n in self.files if n not in self.tensors and not n.endswith(_HARMLESS) and not (spec.tied and n == "lm_head.weight")
        ]
        missing = [n for n in self.tensors if n not in self.files]
        wrong = [
            f"{n} {self.stored_shape(n)} instead of {t.stored_shape}" for n, t in self.tensors.items()
            if n in self.files and self.stored_shape(n) != t.stored_shape
        ]  # fmt: skip
        odd = [f"{n} {self._entry(n)[0]}" for n in self.tensors if n in self.files and self._entry(n)[0] not in _TYPES]
        found = [
            f"{what}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("not known", unknown), ("of another shape", wrong), ("of a type not read here", odd))
            if names
        ]
        if found:
            raise CheckpointError("tensors do not fit config.json: " + "; ".join(found), where=str(self.directory))

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        return self.headers[self.files[name]].tensors[name.removeprefix(self._prefix)]

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        return _TYPES[self._entry(name)[0]]

    def nbytes(self, name: str) -> int:
        return self._entry(name)[3] - self._entry(name)[2]

    def _rows(self, name: str, start: int, length: int, out: torch.Tensor | None = None) -> torch.Tensor:
        kind, shape, first, _ = self._entry(name)
        file = self.files[name]
        if file not in self._fds:
            self._fds[file] = os.open(self.directory / file, os.O_RDONLY)
        if out is None:
            out = torch.empty((length, *shape[1:]), dtype=_TYPES[kind])
        row = math.prod(shape[1:]) * out.element_size()
        view, at = memoryview(out.view(-1).view(torch.uint8).numpy()), 0
        while at < len(view):
            got = os.preadv(self._fds[file], [view[at:]], first + start * row + at)
            if got <= 0:
                raise CheckpointError(f"ends inside {name}", where=str(self.directory / file), fix=_AGAIN)
            at += got
        return out

    def read(self, block: Block) -> torch.Tensor:
        """[out, in], as the file's dtype. Raises CheckpointError where a value is not finite: no weight is, so a bit has changed."""
        transposed = self.tensors[block.hf].transposed
        if block.dim == (1 if transposed else 0):
            found = self._rows(block.hf, block.start, block.length)
        else:
            whole = self._rows(block.hf, 0, self.stored_shape(block.hf)[0])
            found = whole.narrow(1, block.start, block.length)
        self._check_finite(block.hf, found)
        return found.t() if transposed else found

    def read_into(self, block: Block, out: torch.Tensor) -> None:
        """As `read`, to `out`; without a copy on the way where the bytes are the same."""
        whole_rows = block.dim == 0 or block.length == self.tensors[block.hf].shape[1]
        if whole_rows and not self.tensors[block.hf].transposed and out.is_contiguous() and out.dtype == self.dtype(block.hf):
            first, length = (block.start, block.length) if block.dim == 0 else (0, out.size(0))
            self._rows(block.hf, first, length, out)
            self._check_finite(block.hf, out)
        else:
            out.copy_(self.read(block))

    def _check_finite(self, name: str, values: torch.Tensor) -> None:
        if not torch.isfinite(values.sum()) and not values.isfinite().all():  # else the sum overflowed; it is 50 times as fast
            raise CheckpointError(f"{name} has values that are not finite", where=str(self.directory / self.files[name]), fix=_AGAIN)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def left_out_prefix(stored: Iterable[str], tensors: Iterable[str]) -> str:
    """ "transformer." for files like those of gpt2, saved from the model without its head, whose names do not begin with it; else ""."""
    stored, tensors = set(stored), list(tensors)
    prefix = tensors[0].split(".")[0] + "."
    is_bare = all(name.removeprefix(prefix) in stored and not (name.startswith(prefix) and name in stored) for name in tensors)
    return prefix if is_bare else ""


def open_files(directory: Path) -> tuple[dict[str, str], dict[str, Header]]:
    """(tensor -> file, file -> header). Raises CheckpointError for a missing or damaged file."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(
                "no safetensors weights", where=str(directory), expected=f"{SINGLE} or {INDEX}", fix="save the model with safetensors"
            )
        header = read_header(directory / SINGLE)
        return dict.fromkeys(header.tensors, SINGLE), {SINGLE: header}
    try:
        files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        outside = [f for f in files.values() if Path(f).name != f]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"not an index: {type(error).__name__}: {error}", where=str(index), fix=_AGAIN) from error
    if outside:
        raise CheckpointError(f"the index names a file outside the directory: {outside[0]!r}", where=str(index))
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            lost = [name for name, f in files.items() if f == file]
            raise CheckpointError(
                f"the shard {file} is missing, with {len(lost)} tensors: {', '.join(lost[:3])} ...", where=str(index), fix=_AGAIN
            )
    headers = {file: read_header(directory / file) for file in sorted(set(files.values()))}
    strays = [f"{name} (in {file})" for name, file in files.items() if name not in headers[file].tensors]
    if strays:
        raise CheckpointError(f"the index names tensors that are not in their files: {', '.join(strays[:3])}", where=str(index), fix=_AGAIN)
    return files, headers


_SIDE_SUFFIXES, _SIDE_NAMES = (".json", ".txt", ".model", ".jinja", ".tiktoken"), ("README.md", "LICENSE", "NOTICE", "USE_POLICY.md")


def copy_side_files(source: Path, target: Path, *, headers: bool = True) -> None:
    """config, tokenizer, generation config, chat template, licence: every small file that holds no weights, byte for byte.

    headers: note also how the weights were cut into files, for an export of the same shape; else that note stays behind.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _SIDE_SUFFIXES or file.name in _SIDE_NAMES
        if file.is_file() and wanted and not file.name.endswith(".index.json") and (headers or file.name != HEADERS):
            shutil.copyfile(file, target / file.name)
    if headers and ((source / INDEX).is_file() or (source / SINGLE).is_file()):
        _, found = open_files(source)
        index = (source / INDEX).read_text() if (source / INDEX).is_file() else None
        note = {"index": index, "files": {file: header.raw for file, header in found.items()}}
        (target / HEADERS).write_text(json.dumps(note) + "\n")


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be: its header with the eight bytes of its length, and name -> (first byte, bytes)."""

    name: str
    header: bytes
    places: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        return len(self.header) + sum(nbytes for _, nbytes in self.places.values())


Stored = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor -> dtype and shape in the file


def plan_output(tensors: Stored, hf_dir: Path, *, shard_bytes: int = 5 << 30) -> tuple[list[OutputFile], str | None]:
    """(files, text of the index or None for a single file): as `hf_dir` notes its own, else shards of at most `shard_bytes`.

    Raises CheckpointError for a note that would write elsewhere.
    """
    note = json.loads((hf_dir / HEADERS).read_text()) if (hf_dir / HEADERS).is_file() else {"index": None, "files": {}}
    outside = [file for file in note["files"] if Path(file).name != file or not file.endswith(".safetensors")]
    if outside:
        raise CheckpointError(f"it names a file outside the output: {outside[0]!r}", where=str(hf_dir / HEADERS))
    texts = {file: json.loads(raw) for file, raw in note["files"].items()}
    noted = {name: (file, entry) for file, text in texts.items() for name, entry in text.items() if name != "__metadata__"}
    prefix = left_out_prefix(noted, tensors)
    if prefix:
        files, index = plan_output({name.removeprefix(prefix): stored for name, stored in tensors.items()}, hf_dir, shard_bytes=shard_bytes)
        whole = [{prefix + name if prefix + name in tensors else name: place for name, place in f.places.items()} for f in files]
        return [replace(f, places=places) for f, places in zip(files, whole, strict=True)], index
    if set(noted) != set(tensors):
        return _plan_anew(tensors, shard_bytes)
    same = all((_CODES[d], list(shape)) == (noted[n][1]["dtype"], noted[n][1]["shape"]) for n, (d, shape) in tensors.items())
    files = []
    for file, text in texts.items():
        meta = text.get("__metadata__", {"format": "pt"})
        names = sorted((n for n in text if n != "__metadata__"), key=lambda n: text[n]["data_offsets"])
        files.append(_output_file(file, names, tensors, meta, raw=note["files"][file] if same else None))
    index = note["index"]
    if index is not None and not same:
        changed = json.loads(index)
        if "total_size" in changed.get("metadata", {}):
            changed["metadata"]["total_size"] = sum(_nbytes(*stored) for stored in tensors.values())
        index = json.dumps(changed, indent=2) + "\n"
    return files, index


def _plan_anew(tensors: Stored, shard_bytes: int) -> tuple[list[OutputFile], str | None]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, stored in tensors.items():
        if shards[-1] and size + _nbytes(*stored) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(*stored)
    meta = {"format": "pt"}
    if len(shards) == 1:
        return [_output_file(SINGLE, shards[0], tensors, meta)], None
    files = [_output_file(f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", names, tensors, meta) for i, names in enumerate(shards)]
    total = sum(_nbytes(*stored) for stored in tensors.values())
    weight_map = dict(sorted((name, file.name) for file in files for name in file.places))
    return files, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _output_file(file: str, names: list[str], tensors: Stored, meta: Mapping[str, str], *, raw: str | None = None) -> OutputFile:
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
    found = json.loads(raw)
    places = {n: (start + found[n]["data_offsets"][0], _nbytes(*tensors[n])) for n in names}
    return OutputFile(file, len(text).to_bytes(8, "little") + text, places)


def write_from(fd: int, start: int, data: Any, what: str = "") -> int:
    """All of `data` (bytes-like), which an error calls `what`. Raises CheckpointError where the disk is full."""
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(fd, data[done:], start + done)
    except OSError as error:
        raise CheckpointError(f"{what} cannot be written: {error.strerror}".lstrip(), where=os.readlink(f"/proc/self/fd/{fd}")) from error
    return done


def to_disk(fd: int) -> None:
    """What was written is on the disk, and leaves the page cache, where a large model would push out everything else.

    (And the next write finds pages that were in use just now: on a virtual machine they cost a third of fresh ones.)
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
        """The files at their full size with their headers; one process does it."""
        for file in files:
            with (directory / file.name).open("r+b" if (directory / file.name).is_file() else "wb") as f:
                f.truncate(file.size)  # not fallocate: writing into reserved blocks took 2-4 times as long (ext4)
                f.write(file.header)

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """`tensor` as it is stored. Returns its bytes. Raises CheckpointError where the disk is full."""
        file, at, nbytes = self._places[name]
        if file not in self._fds:
            self._fds[file] = os.open(self.directory / file, os.O_WRONLY)
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
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
