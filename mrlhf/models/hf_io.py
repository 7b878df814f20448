"""HF directories: safetensors read slice by slice and written tensor by tensor; config and tokenizer travel unchanged."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mrlhf.errors import CheckpointError
from mrlhf.models.families import hf_tensors
from mrlhf.models.families.blocks import Block
from mrlhf.models.spec import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_HARMLESS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that older releases wrote and nobody reads
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
         "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}  # fmt: skip
_AGAIN = "copy or download the file again"


def resolve_hf(path: str) -> Path:
    """A local directory as it is; anything else is taken for a hub id. Raises CheckpointError."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") > 1 or path.startswith((".", "/")) or not path:
        raise CheckpointError(f"no such directory: {path!r}", expected="a HF directory, a mrlhf checkpoint or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client has no common base class for network and not-found errors
        raise CheckpointError(
            f"no such directory, and the hub does not give it: {path!r} ({type(error).__name__})",
            expected="a HF directory, a mrlhf checkpoint or a hub id",
        ) from error


@dataclass(frozen=True)
class Header:
    """Of a safetensors file: its text, and name -> (type, stored shape, first byte, one past the last byte) counted from the file's start."""

    text: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def read_header(path: Path) -> Header:
    """Raises CheckpointError for a file that is not whole: too short, or with a header that does not describe its bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                raise CheckpointError(f"its header would be {length:,} bytes long in a file of {size:,}", where=str(path), fix=_AGAIN)
            text = json.loads(f.read(length))
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
    return Header(text, tensors)


class HFReader:
    """Reads blocks of the tensors of a HF directory; nothing but the block comes into memory (of columns: the tensor)."""

    def __init__(self, directory: Path, spec: ModelSpec, *, head: str) -> None:
        """Raises CheckpointError unless every tensor of the model is there with its shape, and no other, naming both sides."""
        self.directory = directory
        self.tensors = hf_tensors(spec, head=head)
        self.files, self.headers = open_files(directory)
        self._fds: dict[str, int] = {}
        self._check(spec)

    def _check(self, spec: ModelSpec) -> None:
        unknown = [n for n in self.files if n not in self.tensors and not n.endswith(_HARMLESS) and not (spec.tied and n == "lm_head.weight")]
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
        return self.headers[self.files[name]].tensors[name]

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        return _TYPES[self._entry(name)[0]]

    def nbytes(self, name: str) -> int:
        return self._entry(name)[3] - self._entry(name)[2]

    def _rows(self, name: str, start: int, length: int) -> torch.Tensor:
        kind, shape, first, _ = self._entry(name)
        file = self.files[name]
        if file not in self._fds:
            self._fds[file] = os.open(self.directory / file, os.O_RDONLY)
        out = torch.empty((length, *shape[1:]), dtype=_TYPES[kind])
        row = math.prod(shape[1:]) * out.element_size()
        view, at = memoryview(out.view(torch.uint8).numpy().reshape(-1)), 0
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
        if not torch.isfinite(found.sum(dtype=torch.float32)) and not found.isfinite().all():  # else the sum overflowed
            raise CheckpointError(f"{block.hf} has values that are not finite", where=str(self.directory / self.files[block.hf]), fix=_AGAIN)
        return found.t() if transposed else found

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


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


def copy_side_files(source: Path, target: Path) -> None:
    """config, tokenizer, generation config, chat template: every small file that holds no weights (nor an index of them), byte for byte."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def write_safetensors(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = 5 << 30) -> None:
    """One file, or shards of at most `shard_bytes` and their index; only a shard is in memory."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + nbytes, total + nbytes
    flush()
    if len(shards) == 1:
        os.rename(directory / "part-0", directory / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(names):
        os.rename(directory / f"part-{i}", directory / file)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (directory / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )
