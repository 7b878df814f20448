"""Megatron's distributed checkpoints (torch_dist) written and read one parameter at a time, without a model in memory.

Megatron saves and loads whole state dicts. A converter needs neither: it builds the model of this rank with memory
that is never touched (`Skeleton`), asks Megatron which part of which tensor of the checkpoint each parameter is, and
moves one parameter after the other. Memory: a few times the largest parameter, whatever the model's size.

A file of the format holds torch.save'd tensors one behind the other; `.metadata` says where each is.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
import zlib
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

from mrlhf.checkpoint.manifest import Entry, HashBehind
from mrlhf.checkpoint.safe_pickle import read_metadata
from mrlhf.checkpoint.source import CONTENT, sharding_metadata
from mrlhf.config.options import ParallelConfig
from mrlhf.errors import CheckpointError
from mrlhf.models import gpt
from mrlhf.models.families.blocks import Block
from mrlhf.models.families.spec import ModelSpec
from mrlhf.models.hf_files import to_disk, write_from

_AGAIN = "take an earlier checkpoint, or copy this one again"
_LARGE_BYTES = 1 << 22
_SYNC_BYTES = 1 << 27  # how much a killed conversion may have to do again


@dataclass(frozen=True)
class Piece:
    """Where a part of a parameter stands: `shape` from `offset` on in tensor `key` of the checkpoint, a view of the parameter here."""

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
    blocks: tuple[Block, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Skeleton:
    """What this rank holds of a model, its parameters in the model's order, and the checkpoint's other entries."""

    def __init__(self, spec: ModelSpec, parallel: ParallelConfig, *, head: str, dtype: torch.dtype) -> None:
        model = gpt.build_model(spec, gpt.transformer_config(spec, parallel, dtype=dtype), head=head)  # torch.empty: no page is touched
        self.dtype = dtype
        state = {"model": model.sharded_state_dict(metadata=sharding_metadata())}
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
                pieces.setdefault(value.data.untyped_storage().data_ptr(), []).append(
                    Piece(value.key, tuple(value.global_offset), (*ones, *value.local_shape), tuple(value.global_shape), stride,
                          value.data.storage_offset())
                )  # fmt: skip
        self.parameters = [
            Parameter(name, tuple(p.shape), p.dtype, tuple(blocks), tuple(pieces[p.untyped_storage().data_ptr()]))
            for name, p, blocks in gpt.local_blocks(model, spec, head=head)
            if p.untyped_storage().data_ptr() in pieces  # a tied output layer on the last stage is the embedding of the first
        ]

    def ahead(
        self, parameters: Iterable[Parameter], read: Callable[[Parameter, torch.Tensor], None]
    ) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """The parameters with their values, which `read` fills in: a thread reads the next one while the caller has this one.

        Memory: twice the largest parameter. A value is the caller's until it asks for the next. Raises what `read` raises.
        """
        memory = [
            torch.empty(max(p.nbytes for p in self.parameters), dtype=torch.uint8) for _ in range(2)
        ]  # `Piece.view` counts from a storage's start
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
    """A tensor (or object, without shapes) of the checkpoint: where it is in the file."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    global_shape: tuple[int, ...] | None
    at: int
    length: int


class Journal:
    """What is done of a conversion, in a file beside its output: a line each, and the work's fingerprint in the first.

    A line is written only after what it speaks of is on the disk. So a conversion that was killed goes on where it
    stood, and one of other inputs begins anew. The disk is waited for by a thread, while the next parameters are written.
    """

    def __init__(self, path: Path, fingerprint: Any) -> None:
        self.path, self._bytes = path, 0
        self.done: list[Any] = []
        self._pending: list[str] = []
        self._thread = ThreadPoolExecutor(1, "journal")
        self._noting: Future[None] | None = None
        head = json.dumps(fingerprint, sort_keys=True)
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last line may have been cut
        if lines and lines[0] == head:
            self.done = [json.loads(line) for line in lines[1:]]
            path.write_text("".join(line + "\n" for line in lines))
        else:
            path.write_text(head + "\n")

    def add(self, record: Any, nbytes: int, sync: Callable[[], None]) -> None:
        """`sync` puts the work on the disk; called every 128 MiB, in the thread. Raises OSError of the call before."""
        self._pending.append(json.dumps(record))
        self._bytes += nbytes
        if self._bytes >= _SYNC_BYTES:
            self.wait()
            self._noting = self._thread.submit(self._note, self._pending, sync)
            self._pending, self._bytes = [], 0

    def wait(self) -> None:
        """Until the thread has nothing to do. Raises OSError where the disk failed."""
        if self._noting is not None:
            self._noting.result()

    def _note(self, lines: list[str], sync: Callable[[], None]) -> None:
        sync()
        with self.path.open("a") as f:
            f.write("".join(line + "\n" for line in lines))


class DistWriter:
    """This rank's part of a distributed checkpoint in `directory`; `finish` is collective and makes it readable."""

    def __init__(self, directory: Path, skeleton: Skeleton, journal: Journal) -> None:
        self.directory, self.skeleton, self.journal = directory, skeleton, journal
        self.file = f"__{dist.get_rank()}_0.distcp"
        self.items: list[_Item] = []
        self.done: set[str] = set()
        self._end = journal.done[-1][1] if journal.done else 0
        for name, _, items in journal.done:
            self.done.add(name)
            self.items += [_Item(key, tuple(offset), tuple(shape), tuple(whole), *place) for key, (offset, shape, whole), place in items]
        self._fd = os.open(directory / self.file, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._fd, self._end)
        self._hash = HashBehind(directory / self.file)
        self._hash.up_to(self._end)

    def _sync(self) -> None:
        to_disk(self._fd)

    def write(self, parameter: Parameter, value: torch.Tensor) -> None:
        """`value`: contiguous, of the parameter's shape and dtype. Raises CheckpointError where the disk is full."""
        items = []
        for piece in parameter.pieces:
            length = save_tensor(own_storage(piece.view(value)), self._fd, self._end)
            items.append(_Item(piece.key, piece.offset, piece.shape, piece.global_shape, self._end, length))
            self._end += length
        self._hash.up_to(self._end)
        self.items += items
        record = [parameter.name, self._end, [[i.key, [i.offset, i.shape, i.global_shape], [i.at, i.length]] for i in items]]
        self.journal.add(record, value.nbytes, self._sync)

    def finish(self) -> dict[str, Entry]:
        """Collective. The manifest's entries of all ranks' files, by name, on rank 0."""
        for key, data in self.skeleton.objects:
            blob = io.BytesIO()
            torch.save([data], blob)  # Megatron keeps the objects of one key in a list
            self.items.append(_Item(key, None, None, None, self._end, len(blob.getbuffer())))
            self._end += write_from(self._fd, self._end, blob.getbuffer())
        self.journal.wait()
        self._sync()
        os.close(self._fd)
        entry = self._hash.entry(self._end)
        everyone: list[Any] = [None] * dist.get_world_size()
        dtypes = {piece.key: p.dtype for p in self.skeleton.parameters for piece in p.pieces}
        dist.all_gather_object(everyone, (self.file, self.items, dtypes, entry))
        if dist.get_rank() == 0:
            write_metadata(self.directory, _metadata([share[:3] for share in everyone]))
            torch.save({"content_metadata": CONTENT}, self.directory / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
        dist.barrier()
        return {share[0]: share[3] for share in everyone}


def write_metadata(directory: Path, metadata: Metadata) -> None:
    """The index of a distributed checkpoint, as torch reads it, in the protocol that the weights-only unpickler reads too."""
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol=2))


class _Pickler(pickle.Pickler):
    """A tensor as torch.save describes it; its values stand in a file of their own in the archive."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return "storage", getattr(torch, obj._pickle_storage_type()), "0", "cpu", obj._size()
        return None


def save_tensor(tensor: torch.Tensor, fd: int, at: int) -> int:
    """What torch.save writes, at `at` of the file; returns its length. torch copies the values twice on the way, this not at all."""
    head = io.BytesIO()
    _Pickler(head, protocol=2).dump(tensor)
    data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    with ThreadPoolExecutor(1, "writer") as thread:
        window = _Window(fd, at, 0, thread)
        with zipfile.ZipFile(window, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[arg-type]
            # ZipInfo without a time: the same tensor gives the same bytes
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), head.getvalue())
            archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
            with archive.open(zipfile.ZipInfo("archive/data/0"), "w", force_zip64=tensor.nbytes >= 1 << 31) as member:
                for first in range(0, len(data), _LARGE_BYTES):  # the checksum of one part beside the writing of those before
                    member.write(data[first : first + _LARGE_BYTES])
            archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
        window.wait()
    return window.tell()


def own_storage(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage is no larger than itself: torch.save writes whole storages."""
    if not view.is_contiguous():
        return view.contiguous()
    return torch.from_numpy(view.reshape(-1).view(torch.uint8).numpy()).view(view.dtype).view(view.shape)


def _metadata(everyone: Iterable[tuple[str, list[_Item], dict[str, torch.dtype]]]) -> Metadata:
    tensors: dict[str, Any] = {}
    places = {}
    for file, items, dtypes in everyone:
        for i in items:
            if i.offset is None or i.shape is None or i.global_shape is None:
                tensors[i.key] = BytesStorageMetadata()
            else:
                known = tensors.setdefault(
                    i.key, TensorStorageMetadata(TensorProperties(dtype=dtypes[i.key]), torch.Size(i.global_shape), [])
                )
                known.chunks.append(ChunkStorageMetadata(torch.Size(i.offset), torch.Size(i.shape)))
            index = MetadataIndex(i.key, None if i.offset is None else torch.Size(i.offset))
            places[index] = filesystem._StorageInfo(file, i.at, i.length)
    return Metadata(tensors, None, places, StorageMeta())


class DistReader:
    """Reads parts of the tensors of a distributed checkpoint, whatever layout wrote it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        metadata = read_metadata(directory)
        self._places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._fds: dict[str, int] = {}

    def read(self, parameter: Parameter, out: torch.Tensor) -> None:
        """Fill `out`, contiguous and of the parameter's shape. Raises CheckpointError naming file and tensor."""
        for piece in parameter.pieces:
            view = piece.view(out)
            found = self._tensors.get(piece.key)
            if found is None or tuple(found.size) != piece.global_shape:
                have = "no such tensor" if found is None else f"{tuple(found.size)}"
                raise CheckpointError(f"{piece.key}: {have} instead of {piece.global_shape}", where=str(self.directory), fix=_AGAIN)
            covered = 0
            for chunk in found.chunks:
                at = tuple(chunk.offsets)
                lows = [max(a, b) for a, b in zip(at, piece.offset, strict=True)]
                highs = [min(a + n, b + m) for a, n, b, m in zip(at, chunk.sizes, piece.offset, piece.shape, strict=True)]
                if all(low < high for low, high in zip(lows, highs, strict=True)):
                    covered += self._copy(piece, view, found.properties.dtype, at, tuple(chunk.sizes), lows, highs)
            if covered != view.numel():
                raise CheckpointError(f"{piece.key} is not all there", where=str(self.directory), fix=_AGAIN)

    def _copy(
        self,
        piece: Piece,
        view: torch.Tensor,
        dtype: torch.dtype,
        at: tuple[int, ...],
        sizes: tuple[int, ...],
        lows: list[int],
        highs: list[int],
    ) -> int:
        """The part of a stored chunk at `at` that the piece wants; how many values it was."""
        if at == piece.offset and sizes == piece.shape and dtype == view.dtype and view.is_contiguous():
            self._load(piece.key, at, view)
            return view.numel()
        chunk = self._load(piece.key, at, torch.empty(sizes, dtype=dtype))
        theirs = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, at, strict=True))
        ours = tuple(slice(low - a, high - a) for low, high, a in zip(lows, highs, piece.offset, strict=True))
        part = view[ours]
        part.copy_(chunk[theirs])
        return part.numel()

    def _load(self, key: str, at: tuple[int, ...], out: torch.Tensor) -> torch.Tensor:
        place = self._places[key, at]
        path = self.directory / place.relative_path
        try:
            if place.relative_path not in self._fds:
                self._fds[place.relative_path] = os.open(path, os.O_RDONLY)
            fd = self._fds[place.relative_path]
            start, size, checksum = _record(fd, place.offset, place.length)
            data = memoryview(out.view(-1).view(torch.uint8).numpy())
            if size != len(data) or not _read_into(fd, start, data):
                raise CheckpointError(f"{key}: {size:,} bytes instead of {len(data):,}", where=str(path), fix=_AGAIN)
            if zlib.crc32(data) != checksum:
                raise CheckpointError(f"{key} has changed since it was written (checksum)", where=str(path), fix=_AGAIN)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{key} cannot be read: {error}", where=str(path), fix=_AGAIN) from error
        return out

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _read_into(fd: int, start: int, data: memoryview) -> bool:
    at = 0
    while at < len(data):
        got = os.preadv(fd, [data[at:]], start + at)
        if got <= 0:
            return False
        at += got
    return True


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file; it grows as it is written to. `thread`: writes what is large, until `wait`."""

    def __init__(self, fd: int, start: int, length: int, thread: ThreadPoolExecutor | None = None) -> None:
        self._fd, self._start, self._length, self._at = fd, start, length, 0
        self._thread = thread
        self._writing: list[Future[int]] = []

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._thread is not None and len(data) >= _LARGE_BYTES:
            self._writing.append(self._thread.submit(write_from, self._fd, self._start + self._at, data))
        else:
            write_from(self._fd, self._start + self._at, data)
        self._at += len(data)
        self._length = max(self._length, self._at)
        return len(data)

    def wait(self) -> None:
        """Raises CheckpointError where the disk is full."""
        for one in self._writing:
            one.result()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._fd, min(len(buffer), max(0, self._length - self._at)), self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _record(fd: int, start: int, length: int) -> tuple[int, int, int]:
    """(first byte, size, CRC-32) of the values of a torch.save'd tensor: the member data/0 of a zip archive, not compressed."""
    with zipfile.ZipFile(io.BufferedReader(_Window(fd, start, length))) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("/data/0"))
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    header = os.pread(fd, 30, start + member.header_offset)
    skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return start + member.header_offset + skip, member.file_size, member.CRC
