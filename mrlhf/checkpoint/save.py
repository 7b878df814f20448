"""Saving checkpoints: Megatron's distributed format plus a manifest, whole or not there at all, at once or in the background.

    step_10/
      mrlhf.json   manifest: stage, step, layout, configuration, data position ... and every file with size and SHA-256
      hf/          config.json, tokenizer, generation config, byte for byte as they came
      dist/        weights and optimizer state, torch_dist, independent of TP, PP and DP
      rng/         the random generators of every rank
      ahead.bin    (ppo, rollout.max_staleness 1) the answers to the next rollout's prompts, which older weights gave
      critic/      (ppo) another checkpoint of the same form
A save goes to `step_10.tmp`, is fsync'ed and renamed; the pointers `latest` and `best` follow by the same way.

All ranks plan together which of them writes which tensor (`begin`), each writes and hashes its own file in a thread, and when all
are done rank 0 writes index and manifest and renames (`Save.finish`). A save in the background is the same, with a copy of the tensors
taken first. What fails on one rank fails on all, before the rename: earlier checkpoints are never touched by it.
"""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mrlhf.checkpoint import rng
from mrlhf.checkpoint.manifest import Entry, HashBehind, check, fsync, read_manifest, step_of, steps_in, write_manifest, write_text
from mrlhf.checkpoint.source import CONTENT, sharded, sharding_metadata
from mrlhf.checkpoint.tensor_file import own_storage, save_tensor, write_metadata
from mrlhf.errors import CheckpointError
from mrlhf.models.hf_files import copy_side_files, write_from
from mrlhf.parallel import megatron, state

_SPARE_BYTES = 4 << 20  # index, manifest, random states: what is not counted before a save


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint (this rank's parts of it): `name` is "" for the main one, or the sub-directory."""

    name: str
    models: list[Any]
    optimizer: Any | None
    head: str
    hf_dir: Path


@dataclass(frozen=True)
class Best:
    """Which checkpoint of a run is kept however old: by a number of its manifest's "eval"."""

    metric: str
    highest: bool

    def of(self, checkpoints: Iterable[Path]) -> Path | None:
        """The earliest of the best; None where no manifest has a finite value."""
        values = [(read_manifest(p).get("eval", {}).get(self.metric), p) for p in sorted(checkpoints, key=step_of)]
        known = [(-v if self.highest else v, p) for v, p in values if v is not None and math.isfinite(v)]
        return min(known, key=lambda found: found[0])[1] if known else None


@dataclass(frozen=True)
class Keep:
    """The checkpoints that stay: the newest `last`, every one whose step is a multiple of `every` (0: none), and the best."""

    last: int = 2
    every: int = 0
    best: Best | None = None


def retain(directory: Path, newest: str, keep: Keep) -> None:
    """Point `latest` at the newest checkpoint and `best` at the best one; drop those before it that `keep` does not name.

    Only whole ones count, so nothing is dropped for the sake of a damaged one; the newest itself is never dropped.
    """
    write_text(directory / "latest", newest + "\n")
    limit = step_of(directory / newest)
    there = [p for p in steps_in(directory) if step_of(p) <= limit]
    whole = [p for p in there if p.name == newest or _is_whole(p)]
    kept = {*whole[: keep.last], *(p for p in whole if keep.every and step_of(p) % keep.every == 0)}
    found = keep.best.of(whole) if keep.best is not None else None
    if found is not None:
        write_text(directory / "best", found.name + "\n")
        kept.add(found)
    for old in there:
        if old not in kept:
            _remove(old)


def _is_whole(path: Path) -> bool:
    try:
        check(path, verify="size")
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """A directory with all in it; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def clear_unfinished(directory: Path) -> None:
    """What killed saves have left behind."""
    for left in directory.glob("*.tmp"):
        _remove(left)


class _Writer(threading.Thread):
    """Writes this rank's share of a checkpoint. `error` or `files` (by path in the checkpoint) and `places` (of each part) when it has ended."""

    def __init__(self, root: Path, plans: list[_Plan], blobs: dict[str, bytes]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self.root, self.plans, self.blobs = root, plans, blobs
        self.files: dict[str, Entry] = {}
        self.places: list[dict[Any, Any]] = []
        self.error: str | None = None
        self.seconds = 0.0

    def run(self) -> None:
        start = time.perf_counter()
        try:
            for plan in self.plans:
                self.places.append(self._write_tensors(plan))
            for name, data in self.blobs.items():
                self._write(name, [(None, data)])
        except CheckpointError as error:
            self.error = str(error)
        except Exception as error:  # whatever it is, it must reach the ranks' main threads: this share is not there
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.plans, self.blobs = [], {}  # gives the copies back
            self.seconds = time.perf_counter() - start

    def _write(self, name: str, items: Iterable[tuple[Any, Any]]) -> dict[Any, tuple[int, int]]:
        """A file of (index, tensor or bytes), one behind the other, hashed beside. Returns where each begins, and its length."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        places, end = {}, 0
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        behind = HashBehind(path)
        try:
            for index, data in items:
                length = save_tensor(own_storage(data), fd, end) if isinstance(data, torch.Tensor) else write_from(fd, end, data)
                places[index] = end, length
                end += length
                behind.up_to(end)
            os.fsync(fd)
        finally:
            self.files[name] = behind.entry(end)  # ends its thread, also where the disk is full
            os.close(fd)
        return places

    def _write_tensors(self, plan: _Plan) -> dict[Any, Any]:
        file = f"__{dist.get_rank()}_0.distcp"
        places = self._write(f"{plan.folder}/{file}", plan.items) if plan.items else {}
        return {index: filesystem._StorageInfo(file, *place) for index, place in places.items()}


@dataclass(frozen=True)
class _Plan:
    """What this rank writes of one part: (index, tensor or bytes) one behind the other. `metadata`: rank 0's index of all tensors, not filled."""

    folder: str
    items: list[tuple[Any, Any]]
    common: bytes
    metadata: Metadata | None

    @property
    def nbytes(self) -> int:
        return sum(d.nbytes if isinstance(d, torch.Tensor) else len(d) for _, d in self.items) + len(self.common)


def _make_plan(part: Part, root: Path, *, copy: bool) -> _Plan:
    """Collective. Which tensors of a part this rank writes; with `copy` they are its own from now on."""
    state_dict = sharded(part.models)
    weights = state_dict["model"] if len(part.models) == 1 else dict(state_dict)
    if part.optimizer is not None:
        for one in (
            part.optimizer.chained_optimizers
        ):  # one that has not stepped yet (an actor while its critic warms up) has no state to save
            one.init_state_fn(one.optimizer, one.config)
        state_dict["optimizer"] = part.optimizer.sharded_state_dict(weights, metadata=sharding_metadata(part.models[0]))
    state_dict["content_metadata"] = dict(CONTENT)
    tensors, common = save_preprocess(state_dict, True)
    common_bytes = io.BytesIO()
    torch.save(common, common_bytes)
    tensors = megatron.with_checkpoint_names(tensors)
    writer = FileSystemWriterAsync(str(root / part.name / "dist"), thread_count=1)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(tensors, False), writer, None, 0, planner=planner)
    items: list[tuple[Any, Any]] = []
    for _, _, (blobs, values) in writer.write_buckets or []:
        items += [(item.index, bytes(blob.getbuffer())) for item, blob in blobs]
        # of a GPU's tensors .cpu() is a copy already
        items += [(item.index, t.detach().clone() if copy and t.device.type == "cpu" else t.detach().cpu()) for item, t in values]
    metadata = planned[1]
    if metadata is not None:
        vars(metadata).pop("all_local_plans", None)  # how the work was shared out: of no use to a reader
    return _Plan(f"{part.name}/dist".lstrip("/"), items, common_bytes.getvalue() if dist.get_rank() == 0 else b"", metadata)


def _agree(error: Exception | str | None, where: Path) -> None:
    """Collective. Raises CheckpointError on every rank where there is an error on one."""
    found = [text for text in state.from_all_ranks([f"rank {dist.get_rank()}: {error}" if error else None]) if text]
    if found:
        more = f" (and on {len(found) - 1} more ranks)" if len(found) > 1 else ""
        raise CheckpointError(
            f"cannot be saved: {found[0]}{more}",
            where=str(where),
            expected="earlier checkpoints are untouched",
            fix="make room or mend the permissions, then the same command again goes on from the newest checkpoint",
        )


def on_main(call: Callable[[], None], where: Path) -> None:
    """Collective. `call` on rank 0; a file that cannot be written there is an error of all."""
    error = None
    if dist.get_rank() == 0:
        try:
            call()
        except OSError as caught:
            error = caught
    _agree(error, where)


@dataclass
class Save:
    """One save under way; see `begin`."""

    target: Path
    temporary: Path
    parts: list[Part]
    content: dict[str, Any]
    metadata: list[Metadata | None]
    writer: _Writer
    began: float = field(default_factory=time.perf_counter)

    def state(self) -> int:
        """Of this rank: 0 written, 1 still writing, 2 failed."""
        return 1 if self.writer.is_alive() else 2 if self.writer.error else 0

    def abandon(self) -> None:
        self.writer.join()
        if dist.get_rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def finish(self) -> None:
        """Collective. Waits for all ranks, writes index and manifest, renames. Raises CheckpointError on all where one failed."""
        self.writer.join()
        _agree(self.writer.error, self.target)
        found = state.from_all_ranks([(self.writer.files, self.writer.places)])
        on_main(lambda: self._complete(found), self.target)

    def _complete(self, found: list[tuple[dict[str, Entry], list[dict[Any, Any]]]]) -> None:
        known = {name: one for files, _ in found for name, one in files.items()}
        for i, (part, metadata) in enumerate(zip(self.parts, self.metadata, strict=True)):
            assert metadata is not None
            metadata.storage_data = {index: place for _, places in found for index, place in places[i].items()}
            metadata.storage_meta = StorageMeta()
            folder = self.temporary / part.name / "dist"
            write_metadata(folder, metadata)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        for part in reversed(self.parts):  # the main one last: its manifest counts the others' files
            own = {"head": part.head, "resumable": part.optimizer is not None}
            content = self.content if not part.name else {k: self.content[k] for k in ("stage", "step", "dtype")}
            prefix = f"{part.name}/" if part.name else ""
            entries = {name.removeprefix(prefix): one for name, one in known.items() if name.startswith(prefix)}
            write_manifest(self.temporary / part.name, content | own, known=entries)
        _remove(self.target)  # only a damaged one can be there: a run goes on from the newest whole one
        os.rename(self.temporary, self.target)
        fsync(self.target.parent)


def begin(target: Path, parts: list[Part], content: dict[str, Any], *, copy: bool, files: Mapping[str, bytes] | None = None) -> Save:
    """Collective. Starts to write `target` under a temporary name.

    content: goes into the manifest; has stage, step and dtype. copy: the models may change before `finish`. files: further ones, by name,
    from rank 0. Raises CheckpointError on every rank where the directory cannot be made or the disk has no room.
    """
    files = files if files is not None and dist.get_rank() == 0 else {}
    temporary = target.with_name(target.name + ".tmp")

    def prepare() -> None:
        _remove(temporary)
        try:
            for part in parts:
                (temporary / part.name / "dist").mkdir(parents=True)
                copy_side_files(part.hf_dir, temporary / part.name / "hf")
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    on_main(prepare, target)
    plans = [_make_plan(part, temporary, copy=copy) for part in parts]
    needed = sum(state.from_all_ranks([sum(plan.nbytes for plan in plans) + sum(map(len, files.values()))])) + _SPARE_BYTES

    def check_room() -> None:
        free = shutil.disk_usage(temporary).free
        if free < needed:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes, and {free:,} are free")

    on_main(check_room, target)
    blobs = {f"{plan.folder}/common.pt": plan.common for plan in plans if plan.common}
    blobs |= files
    blobs[f"rng/rank_{dist.get_rank()}.json"] = rng.capture().encode()
    save = Save(target, temporary, parts, content, [plan.metadata for plan in plans], _Writer(temporary, plans, blobs))
    save.writer.start()
    return save


def save(target: Path, parts: list[Part], content: dict[str, Any]) -> None:
    """Collective. One checkpoint, complete when this returns; see `begin` and `Save.finish`."""
    started = begin(target, parts, content, copy=False)
    try:
        started.finish()
    except CheckpointError:
        started.abandon()
        raise
    dist.barrier()
