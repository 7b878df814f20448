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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from mrlhf.checkpoint.manifest import FileEntry, HashBehind
from mrlhf.checkpoint.megatron_lm import common_state
from mrlhf.checkpoint.reader import DistReader
from mrlhf.checkpoint.shards import Sharding, written
from mrlhf.checkpoint.tensor_archive import Item, build_index, own_storage, save_tensor, write_metadata
from mrlhf.config.options import ParallelConfig
from mrlhf.models import gpt
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec
from mrlhf.models.hf_files import to_disk, write_from

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
    padded: bool

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
        self.spec, self.dtype = spec, dtype
        sharding = Sharding([model])
        self.objects = sharding.objects()
        pieces: dict[int, list[Piece]] = {}
        for s in written(sharding.weights()):
            piece = Piece(s.key, s.offset, tuple(s.data.shape), s.global_shape, s.data.stride(),
                          int(s.data.storage_offset()), s.padded)
            pieces.setdefault(s.data.untyped_storage().data_ptr(), []).append(piece)
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
        self.items: list[Item] = []
        self.done: set[str] = set()
        self._end = journal.done[-1][1] if journal.done else 0
        dtypes = {p.name: p.dtype for p in skeleton.parameters}
        for name, _, items in journal.done:
            self.done.add(name)
            for key, shapes, (start, length) in items:
                offset, shape, global_shape = map(tuple, shapes)
                self.items.append(Item(key, offset, shape, global_shape, dtypes[name], start, length))
        self._fd = os.open(directory / self.file, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._fd, self._end)
        self._hash = HashBehind(directory / self.file)
        self._hash.up_to(self._end)

    def write(self, parameter: Parameter, value: torch.Tensor) -> None:
        """`value`: contiguous, of the parameter's shape and dtype. Raises CheckpointError where the disk is full."""
        items = []
        for piece in parameter.pieces:
            length = save_tensor(own_storage(piece.view(value)), self._fd, self._end)
            shapes = (piece.offset, piece.shape, piece.global_shape)
            items.append(Item(piece.key, *shapes, parameter.dtype, self._end, length))
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
            self.items.append(Item(key, (), (), (), None, self._end, len(blob.getbuffer())))
            self._end += write_from(self._fd, self._end, blob.getbuffer())
        self.journal.wait()
        to_disk(self._fd)
        os.close(self._fd)
        entry = self._hash.entry(self._end)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.file, self.items, entry))
        if dist.get_rank() == 0:
            write_metadata(self.directory, build_index([share[:2] for share in everyone]))
            torch.save(common_state(self.skeleton.spec, step=0), self.directory / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
        dist.barrier()
        return {share[0]: share[2] for share in everyone}


def read_parameter(reader: DistReader, parameter: Parameter, out: torch.Tensor) -> None:
    """Fills `out`, contiguous and of the parameter's shape. Raises CheckpointError naming file and tensor."""
    for piece in parameter.pieces:
        reader.read(piece.key, piece.offset, piece.global_shape, piece.view(out), padded=piece.padded)
