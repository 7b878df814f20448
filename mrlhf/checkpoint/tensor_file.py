"""Megatron's distributed checkpoints (torch_dist) written and read one parameter at a time, without a model in memory.

Megatron saves and loads whole state dicts. A converter needs neither: it builds this rank's model with memory that is
never touched (`Skeleton`), asks Megatron which part of which checkpoint tensor each parameter is, and moves one
parameter after the other. Memory: a few times the largest parameter, whatever the model's size.

A file of the format holds tensors as torch.save writes them, one after the other; `.metadata` says where each begins.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories, is_main_replica
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mrlhf.checkpoint.manifest import FileEntry, HashBehind
from mrlhf.checkpoint.safe_pickle import read_metadata
from mrlhf.checkpoint.tensor_archive import own_storage, read_tensor, save_tensor, write_metadata
from mrlhf.config.options import ParallelConfig
from mrlhf.errors import CheckpointError
from mrlhf.models import gpt
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec
from mrlhf.models.hf_files import to_disk, write_from

_AGAIN = "take an earlier checkpoint, or copy this one again"
_SYNC_BYTES = 1 << 27  # a killed conversion repeats at most so much


@dataclass(frozen=True)
class Piece:
    """A part of a parameter: `shape` from `offset` on in the checkpoint's tensor `key`, a strided view in memory."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # first element in the parameter

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.as_strided(self.shape, self.stride, self.start)


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[TensorSlice, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Skeleton:
    """This rank's part of a model: its parameters in the model's order, and the byte objects of the checkpoint."""

    def __init__(self, spec: ModelSpec, parallel: ParallelConfig, *, head: str, dtype: torch.dtype) -> None:
        # torch.empty: no page is touched
        model = gpt.build_model(spec, gpt.transformer_config(spec, parallel, dtype=dtype), head=head)
        self.dtype = dtype
        state = {"model": model.sharded_state_dict(metadata=gpt.sharding_metadata(model))}
        apply_factories(state)
        pieces: dict[int, list[Piece]] = {}
        self.objects: list[tuple[str, Any]] = []
        for value in nested_values(state):
            if not is_main_replica(value.replica_id):
                continue
            if isinstance(value, ShardedObject):
                self.objects.append((value.unique_key, value.data))
            elif isinstance(value, ShardedTensor):
                assert value.data is not None and value.flattened_range is None, value
                ones = (1,) * value.prepend_axis_num
                stride = (*(value.data.stride(0) * value.data.size(0) for _ in ones), *value.data.stride())
                shape, start = (*ones, *value.local_shape), value.data.storage_offset()
                piece = Piece(value.key, tuple(value.global_offset), shape, tuple(value.global_shape), stride, start)
                pieces.setdefault(value.data.untyped_storage().data_ptr(), []).append(piece)
        self.parameters = [
            Parameter(name, tuple(p.shape), p.dtype, tuple(blocks), tuple(pieces[p.untyped_storage().data_ptr()]))
            for name, p, blocks in gpt.local_blocks(model, spec, head=head)
            # a tied output layer on the last pipeline stage is the embedding of the first
            if p.untyped_storage().data_ptr() in pieces
        ]

    def read_ahead(
        self, parameters: Iterable[Parameter], read: Callable[[Parameter, torch.Tensor], None]
    ) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Yields each parameter with its value, which `read` fills in; a thread reads the next one meanwhile.

        A value is valid until the caller asks for the next one. Memory: twice the largest parameter. Raises what `read`
        raises.
        """
        # two buffers: `Piece.view` counts from the start of a storage
        memory = [torch.empty(max(p.nbytes for p in self.parameters), dtype=torch.uint8) for _ in range(2)]
        waiting: tuple[Parameter, torch.Tensor, Future[None]] | None = None
        with ThreadPoolExecutor(1, "reader") as thread:
            for i, p in enumerate(parameters):
                value = memory[i % 2][: p.nbytes].view(p.dtype).view(p.shape)
                before, waiting = waiting, (p, value, thread.submit(read, p, value))
                if before is not None:
                    before[2].result()
                    yield before[:2]
            if waiting is not None:
                waiting[2].result()
                yield waiting[:2]


@dataclass(frozen=True)
class _Item:
    """A chunk of a tensor (or a byte object, without shapes) and its place in the file."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    global_shape: tuple[int, ...] | None
    start: int
    length: int


class Journal:
    """The finished parts of a conversion, one line each, in a file beside its output; line 1 is the fingerprint.

    A line is written only after its part is on the disk. So a killed conversion continues where it stood, and one with
    other inputs begins anew. A thread waits for the disk while the next parameters are written.
    """

    def __init__(self, path: Path, fingerprint: Any) -> None:
        self.path, self._bytes = path, 0
        self.done: list[Any] = []
        self._pending: list[str] = []
        self._thread = ThreadPoolExecutor(1, "journal")
        self._noting: Future[None] | None = None
        head = json.dumps(fingerprint, sort_keys=True)
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # a kill may have cut the last line
        if lines and lines[0] == head:
            self.done = [json.loads(line) for line in lines[1:]]
            path.write_text("".join(line + "\n" for line in lines))
        else:
            path.write_text(head + "\n")

    def add(self, record: Any, nbytes: int, sync: Callable[[], None]) -> None:
        """Notes `nbytes` of work. Every 128 MiB the thread calls `sync`, which puts the work on the disk.

        Raises the OSError of the call before.
        """
        self._pending.append(json.dumps(record))
        self._bytes += nbytes
        if self._bytes >= _SYNC_BYTES:
            self.wait()
            self._noting = self._thread.submit(self._note, self._pending, sync)
            self._pending, self._bytes = [], 0

    def wait(self) -> None:
        """Waits for the thread. Raises OSError where the disk failed."""
        if self._noting is not None:
            self._noting.result()

    def _note(self, lines: list[str], sync: Callable[[], None]) -> None:
        sync()
        with self.path.open("a") as f:
            f.write("".join(line + "\n" for line in lines))


class DistWriter:
    """Writes this rank's part of a distributed checkpoint into `directory`; `finish` writes the index."""

    def __init__(self, directory: Path, skeleton: Skeleton, journal: Journal) -> None:
        self.directory, self.skeleton, self.journal = directory, skeleton, journal
        self.file = f"__{dist.get_rank()}_0.distcp"
        self.items: list[_Item] = []
        self.done: set[str] = set()
        self._end = journal.done[-1][1] if journal.done else 0
        for name, _, items in journal.done:
            self.done.add(name)
            for key, shapes, (start, length) in items:
                offset, shape, global_shape = map(tuple, shapes)
                self.items.append(_Item(key, offset, shape, global_shape, start, length))
        self._fd = os.open(directory / self.file, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._fd, self._end)
        self._hash = HashBehind(directory / self.file)
        self._hash.up_to(self._end)

    def write(self, parameter: Parameter, value: torch.Tensor) -> None:
        """`value`: contiguous, of the parameter's shape and dtype. Raises CheckpointError where the disk is full."""
        items = []
        for piece in parameter.pieces:
            length = save_tensor(own_storage(piece.view(value)), self._fd, self._end)
            items.append(_Item(piece.key, piece.offset, piece.shape, piece.global_shape, self._end, length))
            self._end += length
        self._hash.up_to(self._end)
        self.items += items
        noted = [[i.key, [i.offset, i.shape, i.global_shape], [i.start, i.length]] for i in items]
        self.journal.add([parameter.name, self._end, noted], value.nbytes, lambda: to_disk(self._fd))

    def finish(self) -> dict[str, FileEntry]:
        """Collective. Writes byte objects, and rank 0 the index. Returns the manifest's entry of each rank's file."""
        for key, data in self.skeleton.objects:
            blob = io.BytesIO()
            torch.save([data], blob)  # Megatron keeps the objects of one key in a list
            self.items.append(_Item(key, None, None, None, self._end, len(blob.getbuffer())))
            self._end += write_from(self._fd, self._end, blob.getbuffer())
        self.journal.wait()
        to_disk(self._fd)
        os.close(self._fd)
        entry = self._hash.entry(self._end)
        everyone: list[Any] = [None] * dist.get_world_size()
        dtypes = {piece.key: p.dtype for p in self.skeleton.parameters for piece in p.pieces}
        dist.all_gather_object(everyone, (self.file, self.items, dtypes, entry))
        if dist.get_rank() == 0:
            write_metadata(self.directory, _build_index([share[:3] for share in everyone]))
            torch.save({"content_metadata": gpt.CHECKPOINT_CONTENT}, self.directory / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
        dist.barrier()
        return {share[0]: share[3] for share in everyone}


def _build_index(everyone: Iterable[tuple[str, list[_Item], dict[str, torch.dtype]]]) -> Metadata:
    """The index of the checkpoint. everyone: each rank's file, the items in it, and the dtypes of the tensors."""
    tensors: dict[str, Any] = {}
    places = {}
    for file, items, dtypes in everyone:
        for i in items:
            if i.offset is None or i.shape is None or i.global_shape is None:
                tensors[i.key] = BytesStorageMetadata()
            else:
                properties = TensorProperties(dtype=dtypes[i.key])
                tensor = TensorStorageMetadata(properties, torch.Size(i.global_shape), [])
                chunk = ChunkStorageMetadata(torch.Size(i.offset), torch.Size(i.shape))
                tensors.setdefault(i.key, tensor).chunks.append(chunk)
            index = MetadataIndex(i.key, None if i.offset is None else torch.Size(i.offset))
            places[index] = filesystem._StorageInfo(file, i.start, i.length)
    return Metadata(tensors, None, places, StorageMeta())


class DistReader:
    """Reads parameters from the tensors of a distributed checkpoint, whatever layout wrote it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = read_metadata(directory)
        self._places = {(key.fqn, tuple(key.offset or ())): place for key, place in index.storage_data.items()}
        self._tensors = {k: v for k, v in index.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._fds: dict[str, int] = {}

    def read(self, parameter: Parameter, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the parameter's shape. Raises CheckpointError naming file and tensor."""
        for piece in parameter.pieces:
            view = piece.view(out)
            tensor = self._tensors.get(piece.key)
            if tensor is None or tuple(tensor.size) != piece.global_shape:
                have = "no such tensor" if tensor is None else f"{tuple(tensor.size)}"
                what = f"{piece.key}: {have} instead of {piece.global_shape}"
                raise CheckpointError(what, where=str(self.directory), fix=_AGAIN)
            copied = sum(self._copy_overlap(piece, view, tensor.properties.dtype, chunk) for chunk in tensor.chunks)
            if copied != view.numel():
                what = f"{piece.key} is incomplete: its chunks hold {copied:,} of {view.numel():,} values"
                raise CheckpointError(what, where=str(self.directory), fix=_AGAIN)

    def _copy_overlap(self, piece: Piece, view: torch.Tensor, dtype: torch.dtype, chunk: ChunkStorageMetadata) -> int:
        """Copies what a stored chunk and the piece share into `view`. Returns the number of values."""
        offset, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if offset == piece.offset and sizes == piece.shape and dtype == view.dtype and view.is_contiguous():
            self._read_chunk(piece.key, offset, view)
            return view.numel()
        lows = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
        highs = [min(a + n, b + m) for a, n, b, m in zip(offset, sizes, piece.offset, piece.shape, strict=True)]
        if any(low >= high for low, high in zip(lows, highs, strict=True)):
            return 0
        values = self._read_chunk(piece.key, offset, torch.empty(sizes, dtype=dtype))
        theirs = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, offset, strict=True))
        ours = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, piece.offset, strict=True))
        part = view[ours]
        part.copy_(values[theirs])
        return part.numel()

    def _read_chunk(self, key: str, offset: tuple[int, ...], out: torch.Tensor) -> torch.Tensor:
        place = self._places[key, offset]
        path = self.directory / place.relative_path
        try:
            if place.relative_path not in self._fds:
                self._fds[place.relative_path] = os.open(path, os.O_RDONLY)
            read_tensor(self._fds[place.relative_path], place.offset, place.length, out)
        except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{key} cannot be read: {error}", where=str(path), fix=_AGAIN) from error
        return out

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
