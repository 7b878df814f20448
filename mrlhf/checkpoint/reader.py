"""Reads parts of a checkpoint's tensors, whatever layout wrote it, and whichever of Megatron's names it has.

No pickle is loaded but the index, which safe_pickle.py reads; no rank waits for another.
"""

from __future__ import annotations

import os
import re
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from mrlhf.checkpoint.names import plain_name
from mrlhf.checkpoint.safe_pickle import read_metadata
from mrlhf.checkpoint.shards import Shard
from mrlhf.checkpoint.tensor_archive import read_tensor
from mrlhf.errors import CheckpointError

_AGAIN = "take an earlier checkpoint, or copy this one again"
_CONFIG = "give it the config.json of the same model, or copy it again"
_LAYER = re.compile(r"(.*decoder\.layers\.)(\d+)\.(.*)", re.DOTALL)


class _Chunks:
    """The stored chunks of a tensor, by their first offset."""

    def __init__(self, tensor: TensorStorageMetadata) -> None:
        self.size, self.dtype = tuple(tensor.size), tensor.properties.dtype
        self._chunks = sorted(tensor.chunks, key=lambda c: tuple(c.offsets))
        self._starts = [c.offsets[0] if c.offsets else 0 for c in self._chunks]
        self._longest = max((c.sizes[0] if c.sizes else 1 for c in self._chunks), default=0)

    def between(self, low: int, high: int) -> list[ChunkStorageMetadata]:
        """Those that may hold rows [low, high) of the first dimension."""
        return self._chunks[bisect_left(self._starts, low - self._longest + 1) : bisect_right(self._starts, high - 1)]


class DistReader:
    """The tensors of one torch_dist directory. index: if it has been read."""

    def __init__(self, directory: Path, index: Metadata | None = None) -> None:
        self.directory = directory
        self.index = index or read_metadata(directory)
        self._places = {(key.fqn, tuple(key.offset or ())): place for key, place in self.index.storage_data.items()}
        self.dtypes: dict[str, torch.dtype] = {}  # by plain name
        self._stored: dict[str, str] = {}
        self._chunks: dict[str, _Chunks] = {}
        for name, entry in self.index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self._stored[plain_name(name)] = name
                self.dtypes[plain_name(name)] = entry.properties.dtype
        self._fds: dict[str, int] = {}

    def fill(self, shards: Iterable[Shard]) -> None:
        """Fills the shards' data. Raises CheckpointError naming file and tensor."""
        for s in shards:
            self.read(s.key, s.offset, s.global_shape, s.data, padded=s.padded)

    def rows(self, name: str) -> int:
        """The first dimension of a tensor, 0 without it."""
        stored = self._stored.get(plain_name(name))
        return 0 if stored is None else self.index.state_dict_metadata[stored].size[0]  # type: ignore[union-attr]

    @cached_property
    def _per_layer(self) -> bool:
        """Whether each layer's tensors have names of their own; else those of all layers are one tensor."""
        return any(_LAYER.fullmatch(name) for name in self._stored)

    def read(self, key: str, offset: tuple[int, ...], global_shape: tuple[int, ...], out: torch.Tensor, *,
             padded: bool = False) -> None:
        """Fills `out` with the part from `offset` on of the tensor `key`; rows of padding that it lacks become 0."""
        name = plain_name(key)
        if name not in self._stored:
            name, offset, global_shape, out = self._in_other_form(name, offset, global_shape, out)
        if name not in self._stored:
            raise CheckpointError(f"no such tensor: {key}", where=str(self.directory), fix=_CONFIG)
        stored = self._stored[name]
        if stored not in self._chunks:
            self._chunks[stored] = _Chunks(self.index.state_dict_metadata[stored])  # type: ignore[arg-type]
        chunks = self._chunks[stored]
        size, skip = chunks.size, int(padded)
        if len(size) != len(global_shape) or size[skip:] != global_shape[skip:]:
            what = f"{key}: {size} instead of {global_shape}"
            raise CheckpointError(what, where=str(self.directory), fix=_CONFIG)
        if padded and offset[0] + out.size(0) > size[0]:
            rows = max(0, size[0] - offset[0])
            out[rows:].zero_()
            out = out[:rows]
        first, last = (offset[0], offset[0] + out.size(0)) if size else (0, 1)
        copied = sum(self._copy_overlap(stored, offset, out, chunks.dtype, c) for c in chunks.between(first, last))
        if copied != out.numel():
            what = f"{key} is incomplete: its chunks hold {copied:,} of {out.numel():,} values"
            raise CheckpointError(what, where=str(self.directory), fix=_AGAIN)

    def _in_other_form(
        self, name: str, offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor
    ) -> tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]:
        """The same part where one tensor holds all layers, not one each, or the other way round."""
        if match := _LAYER.fullmatch(name):
            together = match[1] + match[3]
            layers = self.index.state_dict_metadata[self._stored[together]].size[0] if together in self._stored else 0
            return together, (int(match[2]), *offset), (layers, *shape), out[None]
        before, layers_, rest = name.partition("decoder.layers.")
        if layers_ and self._per_layer:
            return f"{before}{layers_}{offset[0]}.{rest}", offset[1:], shape[1:], out[0]
        return name, offset, shape, out

    def _copy_overlap(self, name: str, at: tuple[int, ...], out: torch.Tensor, dtype: torch.dtype,
                      chunk: ChunkStorageMetadata) -> int:
        """Copies what a stored chunk and `out`, which begins at `at`, share. Returns the number of values."""
        offset, sizes, shape = tuple(chunk.offsets), tuple(chunk.sizes), tuple(out.shape)
        on_host = out.device.type == "cpu"
        if offset == at and sizes == shape and dtype == out.dtype and out.is_contiguous() and on_host:
            self._read_chunk(name, offset, out)
            return out.numel()
        lows = [max(a, b) for a, b in zip(offset, at, strict=True)]
        highs = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, at, shape, strict=True)]
        if any(low >= high for low, high in zip(lows, highs, strict=True)):
            return 0
        values = self._read_chunk(name, offset, torch.empty(sizes, dtype=dtype))
        theirs = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, offset, strict=True))
        ours = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, at, strict=True))
        part = out[ours]
        part.copy_(values[theirs])
        return part.numel()

    def _read_chunk(self, name: str, offset: tuple[int, ...], out: torch.Tensor) -> torch.Tensor:
        place = self._places[name, offset]
        path = self.directory / place.relative_path
        try:
            if place.relative_path not in self._fds:
                self._fds[place.relative_path] = os.open(path, os.O_RDONLY)
            read_tensor(self._fds[place.relative_path], place.offset, place.length, out)
        except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{name} cannot be read: {error}", where=str(path), fix=_AGAIN) from error
        return out

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
