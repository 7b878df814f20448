"""The files of a torch_dist directory as torch writes them: tensors, without a copy of the values, and the index.

torch.save writes a zip archive: `data.pkl` describes the tensor, the member `data/0` holds its values, not compressed.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from mrlhf.checkpoint.names import second_names
from mrlhf.models.hf_files import memory_of, write_from

_LARGE_BYTES = 1 << 22


class _Pickler(pickle.Pickler):
    """Describes a tensor as torch.save does; its values go into a member of their own."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return "storage", getattr(torch, obj._pickle_storage_type()), "0", "cpu", obj._size()
        return None


def save_tensor(tensor: torch.Tensor, fd: int, at: int) -> int:
    """Writes what torch.save writes, from byte `at` of the file on. Returns the length.

    torch.save copies the values twice on the way, this function never.
    """
    head = io.BytesIO()
    _Pickler(head, protocol=2).dump(tensor)
    data = memory_of(tensor)
    with ThreadPoolExecutor(1, "writer") as thread:
        window = _Window(fd, at, 0, thread)
        with zipfile.ZipFile(window, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[arg-type]
            # ZipInfo without a time: the same tensor gives the same bytes
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), head.getvalue())
            archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
            with archive.open(zipfile.ZipInfo("archive/data/0"), "w", force_zip64=tensor.nbytes >= 1 << 31) as member:
                for first in range(0, len(data), _LARGE_BYTES):  # zipfile's checksum runs while the thread writes
                    member.write(data[first : first + _LARGE_BYTES])
            archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
        window.wait()
    return window.tell()


@dataclass(frozen=True)
class Item:
    """What lies in bytes [start, start + length) of a rank's file: a chunk of a tensor, or a byte object."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a byte object
    start: int
    length: int


def build_index(everyone: Iterable[tuple[str, Iterable[Item]]]) -> metadata.Metadata:
    """The index of a checkpoint. everyone: each rank's file and the items in it, which fill every tensor once."""
    tensors: dict[str, Any] = {}
    places = {}
    for file, items in everyone:
        for i in items:
            offset = None if i.dtype is None else torch.Size(i.offset)
            if offset is None:
                tensors[i.key] = metadata.BytesStorageMetadata()
            else:
                properties = metadata.TensorProperties(dtype=i.dtype)
                tensor = metadata.TensorStorageMetadata(properties, torch.Size(i.global_shape), [])
                chunk = metadata.ChunkStorageMetadata(offset, torch.Size(i.shape))
                tensors.setdefault(i.key, tensor).chunks.append(chunk)
            key = metadata.MetadataIndex(i.key, offset)
            assert key not in places, key
            places[key] = filesystem._StorageInfo(file, i.start, i.length)
    for name, tensor in tensors.items():
        stored = sum(math.prod(c.sizes) for c in getattr(tensor, "chunks", ()))
        assert stored == math.prod(getattr(tensor, "size", (0,))), f"{stored} values of {name}: {tensor}"
    for other, name in second_names([name for name, tensor in tensors.items() if hasattr(tensor, "chunks")]).items():
        tensors[other] = tensors[name]
        for chunk in tensors[name].chunks:
            places[metadata.MetadataIndex(other, chunk.offsets)] = places[metadata.MetadataIndex(name, chunk.offsets)]
    return metadata.Metadata(tensors, None, places, metadata.StorageMeta())


def write_metadata(directory: Path, index: metadata.Metadata) -> None:
    """Writes the index of a torch_dist directory, in the protocol that the weights-only unpickler reads."""
    with (directory / ".metadata").open("wb") as file:
        _IndexPickler(file, protocol=2).dump(index)


class _IndexPickler(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        """A member of an enum by its value: Python before 3.11.4 writes a call of getattr, which no reader may run."""
        return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented


def own_storage(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage holds nothing else: torch.save writes whole storages."""
    if not view.is_contiguous():
        return view.contiguous()
    if not view.numel():
        return view.clone()
    return torch.frombuffer(memory_of(view), dtype=torch.uint8).view(view.dtype).view(view.shape)


def read_tensor(fd: int, start: int, length: int, out: torch.Tensor) -> None:
    """Fills `out`, contiguous, from the archive in bytes [start, start + length) of the file.

    Raises ValueError where the values have another size or checksum, BadZipFile or StopIteration for another file.
    """
    with zipfile.ZipFile(io.BufferedReader(_Window(fd, start, length))) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("/data/0"))
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    header = os.pread(fd, 30, start + member.header_offset)
    at = start + member.header_offset + 30
    at += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = memory_of(out)
    if member.file_size != len(data) or not _read_into(fd, at, data):
        raise ValueError(f"{member.file_size:,} bytes instead of {len(data):,}")
    if zlib.crc32(data) != member.CRC:
        raise ValueError("it has changed since it was written (checksum)")


def _read_into(fd: int, start: int, data: memoryview) -> bool:
    """Fills `data` from byte `start` of the file; False where the file is too short."""
    at = 0
    while at < len(data):
        n = os.preadv(fd, [data[at:]], start + at)
        if n <= 0:
            return False
        at += n
    return True


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file of its own; writing makes it longer.

    thread: writes large pieces, until `wait`.
    """

    def __init__(self, fd: int, start: int, length: int, thread: ThreadPoolExecutor | None = None) -> None:
        self._fd, self._start, self._length, self._at = fd, start, length, 0
        self._thread = thread
        self._writing: list[Future[int]] = []

    def seekable(self) -> bool:
        return True

    readable = writable = seekable

    def write(self, data: Any) -> int:
        if self._thread is not None and len(data) >= _LARGE_BYTES:
            self._writing.append(self._thread.submit(write_from, self._fd, self._start + self._at, data))
        else:
            write_from(self._fd, self._start + self._at, data)
        self._at += len(data)
        self._length = max(self._length, self._at)
        return len(data)

    def wait(self) -> None:
        """Waits for the thread. Raises CheckpointError where the disk is full."""
        for writing in self._writing:
            writing.result()

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
