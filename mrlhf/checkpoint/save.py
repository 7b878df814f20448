"""Saves checkpoints: Megatron's distributed format plus a manifest, all or nothing, at once or in the background.

    step_10/
      mrlhf.json   manifest: stage, step, layout, configuration, data position ... and every file with size and SHA-256
      hf/          config.json, tokenizer, generation config, byte for byte as in the source
      dist/        weights and optimizer state, torch_dist, independent of TP, PP and DP
      iter_0000010 -> dist, latest_checkpointed_iteration.txt    the names that Megatron-LM's --load looks for
      rng/         the random generators of every rank
      ahead.bin    (ppo, rollout.max_staleness 1) answers to the next rollout's prompts, sampled from older weights
      critic/      (ppo) another checkpoint of the same form
A save goes to `step_10.tmp`, is fsync'ed and renamed; then the pointers `latest` and `best` are replaced the same way.

Each rank writes the shards that it holds (shards.py): its slices of the optimizer state, and a part of the weights that
data-parallel ranks hold alike. A thread writes and hashes the rank's file. When all ranks have written, rank 0 writes
index and manifest and renames (`Save.finish`). A save in the background first copies the tensors. An error on one rank
is raised on all ranks before the rename, so earlier checkpoints stay untouched.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from mrlhf.checkpoint import manifest, megatron_lm, rng
from mrlhf.checkpoint.shards import Shard, Sharding, written
from mrlhf.checkpoint.tensor_archive import Item, build_index, own_storage, save_tensor, write_metadata
from mrlhf.errors import CheckpointError
from mrlhf.models.families import spec_from_hf
from mrlhf.models.families.spec import read_hf_config
from mrlhf.models.hf_files import copy_side_files, write_from
from mrlhf.observe.directory import is_held
from mrlhf.parallel import state

_SPARE_BYTES = 4 << 20  # index, manifest, random states: not counted before a save


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint, as this rank holds it. name: "" for the main one, or its folder."""

    name: str
    models: list[Any]
    optimizer: Any | None
    head: str
    hf_dir: Path


@dataclass(frozen=True)
class Best:
    """The rule for the checkpoint that is kept however old it is: by a metric in its manifest's "eval"."""

    metric: str
    highest: bool

    def best_among(self, checkpoints: Iterable[Path]) -> Path | None:
        """The best checkpoint, of equals the earliest; None where no manifest has a finite value."""
        ordered = sorted(checkpoints, key=manifest.step_of)
        values = [(manifest.read_manifest(p).get("eval", {}).get(self.metric), p) for p in ordered]
        known = [(-v if self.highest else v, p) for v, p in values if v is not None and math.isfinite(v)]
        return min(known, key=lambda pair: pair[0])[1] if known else None


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last`, those whose step is a multiple of `every` (0: none), and the best."""

    last: int = 2
    every: int = 0
    best: Best | None = None


def retain(directory: Path, newest: str, keep: Keep) -> None:
    """Points `latest` at the newest checkpoint and `best` at the best one; removes earlier ones that `keep` drops.

    Only whole ones count: a damaged checkpoint never takes the place of a whole one. The newest is never removed.
    """
    manifest.write_text(directory / "latest", newest + "\n")
    limit = manifest.step_of(directory / newest)
    checkpoints = [p for p in manifest.steps_in(directory) if manifest.step_of(p) <= limit]
    whole = [p for p in checkpoints if p.name == newest or is_whole(p)]
    kept = {*whole[: keep.last], *(p for p in whole if keep.every and manifest.step_of(p) % keep.every == 0)}
    best = keep.best.best_among(whole) if keep.best is not None else None
    if best is not None:
        manifest.write_text(directory / "best", best.name + "\n")
        kept.add(best)
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            manifest.remove(checkpoint)


def is_whole(path: Path) -> bool:
    try:
        manifest.check_manifest(path, verify="size")
    except CheckpointError:
        return False
    return True


def clear_unfinished(directory: Path) -> None:
    """Removes the temporary directories and files of killed saves and exports, but for an export that still runs."""
    for path in directory.glob("*.tmp"):
        if not is_held(path / "lock"):
            manifest.remove(path)


class _Writer(threading.Thread):
    """Writes this rank's files of a checkpoint.

    When it has ended: `error`, or `files` (by path in the checkpoint) and `items` (for each part what its file holds).
    """

    def __init__(self, root: Path, plans: list[_WritePlan], blobs: dict[str, bytes]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self.root, self.plans, self.blobs = root, plans, blobs
        self.files: dict[str, manifest.FileEntry] = {}
        self.items: list[list[Item]] = []
        self.error: str | None = None

    def run(self) -> None:
        try:
            for plan in self.plans:
                self.items.append(self._write_plan(plan))
            for name, data in self.blobs.items():
                self._write(name, [data])
        except CheckpointError as error:
            self.error = str(error)
        except Exception as error:  # any error must reach the main threads of all ranks: this rank's file is not whole
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.plans, self.blobs = [], {}  # frees the copies

    def _write(self, name: str, contents: Iterable[torch.Tensor | bytes]) -> list[tuple[int, int]]:
        """Writes tensors and bytes one after the other and hashes the file. Returns (start, length) of each."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        places, end = [], 0
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        behind = manifest.HashBehind(path)
        try:
            for data in contents:
                if isinstance(data, torch.Tensor):
                    length = save_tensor(own_storage(data.cpu()), fd, end)  # of a GPU's tensors one at a time
                else:
                    length = write_from(fd, end, data)
                places.append((end, length))
                end += length
                behind.up_to(end)
            os.fsync(fd)
        finally:
            self.files[name] = behind.entry(end)  # ends the thread, also where the disk is full
            os.close(fd)
        return places

    def _write_plan(self, plan: _WritePlan) -> list[Item]:
        contents = [*(data for _, data in plan.objects), *(s.data for s in plan.shards)]
        places = self._write(f"{plan.folder}/{_shard_file()}", contents) if contents else []
        heads = [*((key, (), (), (), None) for key, _ in plan.objects),
                 *((s.key, s.offset, tuple(s.data.shape), s.global_shape, s.data.dtype) for s in plan.shards)]
        return [Item(*head, *place) for head, place in zip(heads, places, strict=True)]


def _shard_file() -> str:
    return f"__{dist.get_rank()}_0.distcp"


@dataclass(frozen=True)
class _WritePlan:
    """What this rank writes for one part, in the order of the file: byte objects and shards of tensors."""

    folder: str
    objects: list[tuple[str, bytes]]
    shards: list[Shard]
    common: bytes

    @property
    def nbytes(self) -> int:
        return sum(s.data.nbytes for s in self.shards) + sum(len(d) for _, d in self.objects) + len(self.common)


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _plan_writes(part: Part, content: Mapping[str, Any], *, copy: bool) -> _WritePlan:
    """Plans what this rank writes of a part: its own shards, without another rank's values. copy: copies them to the
    host, so that the model may change.
    """
    sharding = Sharding(part.models)
    spec = spec_from_hf(read_hf_config(part.hf_dir), where=str(part.hf_dir / "config.json"))
    shards, common = sharding.weights(), megatron_lm.common_state(spec, step=content["step"])
    if part.optimizer is not None:
        of_optimizer, common["optimizer"] = sharding.optimizer(part.optimizer)
        shards += of_optimizer
    shards = written(shards)
    if copy:  # .cpu() copies the tensors of a GPU anyway
        shards = [replace(s, data=s.data.clone() if s.data.device.type == "cpu" else s.data.cpu()) for s in shards]
    objects = [(key, _saved([value])) for key, value in sharding.objects()]  # Megatron keeps those of one key in a list
    return _WritePlan(f"{part.name}/dist".lstrip("/"), objects, shards,
                      _saved(common) if dist.get_rank() == 0 else b"")


def _raise_together(error: Exception | str | None, where: Path) -> None:
    """Collective. Raises CheckpointError on every rank if one rank has an error."""
    errors = [text for text in state.from_all_ranks([f"rank {dist.get_rank()}: {error}" if error else None]) if text]
    if errors:
        more = f" (and on {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
        fix = "make room or mend the permissions; the same command then goes on from the newest checkpoint"
        expected = "earlier checkpoints are untouched"
        raise CheckpointError(f"cannot be saved: {errors[0]}{more}", where=str(where), expected=expected, fix=fix)


def on_main(call: Callable[[], None], where: Path) -> None:
    """Collective. Runs `call` on rank 0; an OSError there is a CheckpointError on every rank."""
    error = None
    if dist.get_rank() == 0:
        try:
            call()
        except OSError as caught:
            error = caught
    _raise_together(error, where)


@dataclass
class Save:
    """A save that `begin_save` has started."""

    target: Path
    temporary: Path
    parts: list[Part]
    content: dict[str, Any]
    writer: _Writer
    began: float = field(default_factory=time.perf_counter)

    def status(self) -> int:
        """This rank's progress: 0 written, 1 still writing, 2 failed."""
        return 1 if self.writer.is_alive() else 2 if self.writer.error else 0

    def abandon(self) -> None:
        """Waits for this rank's thread; rank 0 removes the temporary directory."""
        self.writer.join()
        if dist.get_rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def finish(self) -> None:
        """Collective. Waits for all ranks, writes index and manifest, renames.

        Raises CheckpointError on every rank if one failed.
        """
        self.writer.join()
        _raise_together(self.writer.error, self.target)
        everyone = state.from_all_ranks([(_shard_file(), self.writer.files, self.writer.items)])
        on_main(lambda: self._complete(everyone), self.target)

    def _complete(self, everyone: list[tuple[str, dict[str, manifest.FileEntry], list[list[Item]]]]) -> None:
        """Rank 0's end of a save. everyone: of each rank its file's name, its files, and the items of each part."""
        known = {name: entry for _, files, _ in everyone for name, entry in files.items()}
        for i, part in enumerate(self.parts):
            folder = self.temporary / part.name / "dist"
            write_metadata(folder, build_index((file, items[i]) for file, _, items in everyone))
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            if part.head == "lm":
                megatron_lm.add_names(folder.parent, step=self.content["step"])
        for part in reversed(self.parts):  # the main part last: its manifest lists the files of the others too
            own = {"head": part.head, "resumable": part.optimizer is not None}
            content = self.content if not part.name else {k: self.content[k] for k in ("stage", "step", "dtype")}
            prefix = f"{part.name}/" if part.name else ""
            entries = {name.removeprefix(prefix): e for name, e in known.items() if name.startswith(prefix)}
            manifest.write_manifest(self.temporary / part.name, content | own, known=entries)
        manifest.remove(self.target)  # only a damaged one can exist: a run goes on from the newest whole one
        os.rename(self.temporary, self.target)
        manifest.fsync(self.target.parent)


def begin_save(target: Path, parts: list[Part], content: dict[str, Any], *, copy: bool,
               files: Mapping[str, bytes] | None = None) -> Save:
    """Collective. Starts to write `target` under a temporary name.

    content: goes into the manifest; has stage, step and dtype. copy: the models may change before `finish`.
    files: more files by name, from rank 0. Raises CheckpointError on every rank where the directory cannot be made or
    the disk has no room.
    """
    files = files if files is not None and dist.get_rank() == 0 else {}
    temporary = target.with_name(target.name + ".tmp")

    def prepare() -> None:
        manifest.remove(temporary)
        try:
            for part in parts:
                (temporary / part.name / "dist").mkdir(parents=True)
                copy_side_files(part.hf_dir, temporary / part.name / "hf")
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    on_main(prepare, target)
    plans = [_plan_writes(part, content, copy=copy) for part in parts]
    own_bytes = sum(plan.nbytes for plan in plans) + sum(map(len, files.values()))
    needed = sum(state.from_all_ranks([own_bytes])) + _SPARE_BYTES

    def check_room() -> None:
        free = shutil.disk_usage(temporary).free
        if free < needed:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes, and {free:,} are free")

    on_main(check_room, target)
    blobs = {f"{plan.folder}/common.pt": plan.common for plan in plans if plan.common}
    blobs |= files
    blobs[f"rng/rank_{dist.get_rank()}.json"] = rng.capture().encode()
    started = Save(target, temporary, parts, content, _Writer(temporary, plans, blobs))
    started.writer.start()
    return started


def save(target: Path, parts: list[Part], content: dict[str, Any]) -> None:
    """Collective. Writes one checkpoint, complete on return. Raises as `begin_save` and `Save.finish`."""
    started = begin_save(target, parts, content, copy=False)
    try:
        started.finish()
    except CheckpointError:
        started.abandon()
        raise
    dist.barrier()
