"""Checkpoints: Megatron's distributed format plus a manifest, whole or not there at all.

    step_10/
      mrlhf.json   manifest: stage, step, head, dtype, files with sizes, metadata (reward statistics ...)
      hf/          config.json, tokenizer, generation config, byte for byte as they came
      dist/        weights and optimizer state, torch_dist, independent of TP, PP and DP
      critic/      (ppo) another checkpoint of the same form
A save goes to `step_10.tmp`, is fsync'ed and renamed; the pointers `latest` and `best` follow by the same way.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mrlhf
from mrlhf.errors import CheckpointError
from mrlhf.models.families import spec_from_hf
from mrlhf.models.hf_io import HFReader, copy_side_files, resolve_hf
from mrlhf.models.spec import ModelSpec, read_hf_config
from mrlhf.safe_pickle import check_directory, read_metadata

MANIFEST, FORMAT = "mrlhf.json", 1
_OPTIMIZER_FORMAT = "fully_reshardable"
CONTENT = {"distrib_optim_sharding_type": _OPTIMIZER_FORMAT}  # as Megatron notes it in a checkpoint


@dataclass(frozen=True)
class ModelSource:
    """A model on disk: a mrlhf checkpoint (`manifest`) or a HF directory (`manifest` empty)."""

    path: Path
    hf_dir: Path
    spec: ModelSpec
    head: str
    manifest: dict[str, Any]

    @property
    def is_checkpoint(self) -> bool:
        return bool(self.manifest)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path)) from error


def _latest(directory: Path) -> Path | None:
    """The checkpoint a directory of checkpoints (or a run's directory) points at; without `latest` the newest whole one."""
    for place in (directory, directory / "checkpoints"):
        pointer = place / "latest"
        if pointer.is_file():
            name = pointer.read_text().strip()
            if re.fullmatch(r"step_\d+", name) and (place / name / MANIFEST).is_file():
                return place / name
        steps = [p for p in place.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / MANIFEST).is_file()]
        if steps:
            return max(steps, key=lambda p: int(p.name[5:]))
    return None


def open_source(path: str) -> ModelSource:
    """A mrlhf checkpoint, a run's directory (its latest checkpoint), its checkpoints/best, a HF directory or a hub id.

    Raises CheckpointError when it is none of them or its files are not all there.
    """
    directory = Path(path)
    if directory.name in ("best", "latest") and directory.is_file() and re.fullmatch(r"step_\d+", name := directory.read_text().strip()):
        directory = directory.parent / name
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        directory = _latest(directory) or directory
    if (directory / MANIFEST).is_file():
        manifest = _json(directory / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"format {manifest.get('format')!r}", where=str(directory / MANIFEST), expected=str(FORMAT))
        outside = [f for f in manifest["files"] if Path(f).is_absolute() or ".." in Path(f).parts]
        if outside:
            raise CheckpointError(f"it names a file outside the checkpoint: {outside[0]!r}", where=str(directory / MANIFEST))
        wrong = [f for f, size in manifest["files"].items() if not (directory / f).is_file() or (directory / f).stat().st_size != size]
        if wrong:
            raise CheckpointError(
                f"missing or of another size: {', '.join(wrong[:5])}", where=str(directory), fix="take an earlier checkpoint"
            )
        hf_dir = directory / "hf"
        return ModelSource(
            directory, hf_dir, spec_from_hf(read_hf_config(hf_dir), where=str(hf_dir / "config.json")), manifest["head"], manifest
        )
    directory = resolve_hf(path)
    if not (directory / "config.json").is_file():
        raise CheckpointError("neither a checkpoint nor a HF model", where=path, expected=f"{MANIFEST}, checkpoints/ or config.json in it")
    config = read_hf_config(directory)
    head = "value" if any(a.endswith("ForSequenceClassification") for a in config.get("architectures") or []) else "lm"
    return ModelSource(directory, directory, spec_from_hf(config, where=str(directory / "config.json")), head, {})


def sharding_metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": _OPTIMIZER_FORMAT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded(models: list[Any]) -> dict[str, Any]:
    """State of this rank's parts of the model; on disk names have no part in them, so any number of parts reads any other's."""
    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    return {name: model.sharded_state_dict(metadata=sharding_metadata()) for name, model in zip(names, models, strict=True)}


def _dist_save(directory: Path, models: list[Any], optimizer: Any | None) -> None:
    from megatron.core import dist_checkpointing

    state = _sharded(models)
    weights = state["model"] if len(models) == 1 else dict(state)
    if optimizer is not None:
        for part in optimizer.chained_optimizers:  # one that has not stepped yet (an actor while its critic warms up) has no state to save
            part.init_state_fn(part.optimizer, part.config)
        state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=sharding_metadata())
    dist_checkpointing.save(state, str(directory), content_metadata=dict(CONTENT))


def _dist_load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fill `state`. Raises CheckpointError before anything is unpickled that a checkpoint would not hold."""
    from megatron.core import dist_checkpointing

    check_directory(directory)
    return dist_checkpointing.load(state, str(directory))


def load_weights(source: ModelSource, models: list[Any], *, head: str, seed: int) -> None:
    """Fill a rank's built model (its parts, in an interleaved pipeline) from `source`.

    An LM gives a value model everything but its head, which is drawn from `seed`.

    Raises CheckpointError for the other direction: a value model has no LM head to give.
    """
    from mrlhf.models.gpt import RandomSource, fill

    if head == "lm" and source.head == "value":
        raise CheckpointError("it holds a value model, which has no LM head", where=str(source.path), expected="an LM checkpoint")
    new_head = head == "value" and source.head == "lm"
    if source.is_checkpoint:
        state = _sharded(models)
        if new_head:
            state = {part: {k: v for k, v in names.items() if not k.startswith("output_layer.")} for part, names in state.items()}
        with torch.no_grad():
            loaded = _dist_load(state, source.path / "dist")
            for part, model in zip(state, models, strict=True):
                missing, unexpected = model.load_state_dict(loaded[part], strict=False)
                missing = [k for k in missing if not k.endswith("_extra_state") and not (new_head and k.startswith("output_layer."))]
                assert not missing and not unexpected, (missing, unexpected)
    else:
        reader = HFReader(source.path, source.spec, head=source.head)
        values = _WithHead(reader, RandomSource(source.spec, head=head, seed=seed)) if new_head else reader
        for model in models:
            fill(model, source.spec, values, head=head)
        reader.close()
    if new_head and source.is_checkpoint:
        for model in models:
            fill(model, source.spec, RandomSource(source.spec, head=head, seed=seed), head=head, only="output_layer.")


@dataclass(frozen=True)
class _WithHead:
    """HF tensors, and a drawn value head."""

    reader: HFReader
    head: Any

    def read(self, block: Any) -> torch.Tensor:
        return (self.head if block.hf == "score.weight" else self.reader).read(block)


def check_optimizer_names(names: Iterable[str], *, spread: bool, where: str) -> None:
    """`spread`: experts are over ranks now, and Megatron has an optimizer of their own for them. Raises CheckpointError where it was not so."""
    was_spread = any(name.startswith("chained_") for name in names)
    if was_spread != spread:
        one, more = "parallel.expert_model_parallel_size = 1", "parallel.expert_model_parallel_size above 1"
        raise CheckpointError(
            f"its optimizer state was written with {more if was_spread else one}", where=where, expected=more if was_spread else one,
            fix="that size (any above 1 is as good as another), or start anew from its weights: --model.path and another --train.output_dir",
        )  # fmt: skip


def load_optimizer(directory: Path, models: list[Any], optimizer: Any) -> None:
    """Weights and optimizer state of a checkpoint directory, whatever layout wrote it.

    Raises CheckpointError where experts were spread over ranks and are not now, or the other way round: Megatron keeps their optimizer
    state under other names then.
    """
    from mrlhf.parallel import state as ranks

    spread = ranks.on_any_rank(len(optimizer.chained_optimizers) > 1)
    check_optimizer_names(read_metadata(directory / "dist").state_dict_metadata, spread=spread, where=str(directory))
    state = _sharded(models)
    parts, weights = list(state), state["model"] if len(models) == 1 else dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=sharding_metadata())
    with torch.no_grad():
        loaded = _dist_load(state, directory / "dist")
        for part, model in zip(parts, models, strict=True):
            model.load_state_dict(loaded[part])
        optimizer.load_state_dict(loaded["optimizer"])


def fsync(path: Path) -> None:
    """Push a file's content, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: temporary name, fsync, rename."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    fsync(tmp)
    os.replace(tmp, path)


def write_manifest(directory: Path, *, stage: str, step: int, head: str, dtype: str, resumable: bool, extra: dict[str, Any]) -> None:
    files = {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    for name in files:
        fsync(directory / name)
    manifest = {
        "format": FORMAT,
        "mrlhf": mrlhf.__version__,
        "stage": stage,
        "step": step,
        "head": head,
        "dtype": dtype,
        "resumable": resumable,
        **extra,
    }
    write_text(directory / MANIFEST, json.dumps({**manifest, "files": files}, indent=1) + "\n")


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

    def of(self, checkpoints: list[Path]) -> Path | None:
        """The earliest of the best; None where no manifest has a finite value."""
        values = [(_json(p / MANIFEST).get("eval", {}).get(self.metric), p) for p in sorted(checkpoints, key=_step)]
        known = [(-v if self.highest else v, p) for v, p in values if v is not None and math.isfinite(v)]
        return min(known, key=lambda found: found[0])[1] if known else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def retain(directory: Path, newest: str, *, keep_last: int, best: Best | None) -> None:
    """Point `latest` at the newest checkpoint and `best` at the best one; drop the others but for the last few."""
    write_text(directory / "latest", newest + "\n")
    whole = sorted((p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / MANIFEST).is_file()), key=_step)
    kept = set(whole[-keep_last:])
    found = best.of(whole) if best is not None else None
    if found is not None:
        write_text(directory / "best", found.name + "\n")
        kept.add(found)
    for old in whole:
        if old not in kept:
            shutil.rmtree(old)


def save(
    target: Path,
    parts: list[Part],
    *,
    stage: str,
    step: int,
    dtype: str,
    extra: dict[str, Any],
    keep_last: int | None = None,
    best: Best | None = None,
) -> None:
    """Collective. Writes `target` under a temporary name and renames it; then `latest` and `best`; then drops what is not kept."""
    main = dist.get_rank() == 0
    tmp = target.with_name(target.name + ".tmp")
    if main:
        left = target.parent.glob("step_*.tmp") if keep_last is not None else ()
        for unfinished in {tmp, *left}:  # of saves that were killed
            shutil.rmtree(unfinished, ignore_errors=True)
        tmp.mkdir(parents=True)
        for part in parts:
            (tmp / part.name / "dist").mkdir(parents=True)
            copy_side_files(part.hf_dir, tmp / part.name / "hf")
    dist.barrier()
    for part in parts:
        _dist_save(tmp / part.name / "dist", part.models, part.optimizer)
    dist.barrier()
    if main:
        for part in reversed(parts):  # the main one last: its manifest counts the others' files
            resumable = part.optimizer is not None
            write_manifest(
                tmp / part.name,
                stage=stage,
                step=step,
                head=part.head,
                dtype=dtype,
                resumable=resumable,
                extra=extra if not part.name else {},
            )
        if target.exists():
            shutil.rmtree(target)
        os.rename(tmp, target)
        fsync(target.parent)
        if keep_last is not None:
            retain(target.parent, target.name, keep_last=keep_last, best=best)
    dist.barrier()


def to_resume(run_dir: Path, *, total_steps: int) -> ModelSource | None:
    """The newest whole checkpoint of a run; None for a new run.

    Raises CheckpointError where the run is not finished and the checkpoint cannot be gone on from (weights only).
    """
    found = _latest(run_dir / "checkpoints")
    if found is None:
        return None
    source = open_source(str(found))
    if source.manifest["step"] < total_steps and not source.manifest["resumable"]:
        raise CheckpointError(
            f"it has weights only and stands at step {source.manifest['step']} of {total_steps}",
            where=str(source.path),
            expected="a checkpoint with optimizer state (checkpoint.save_optimizer)",
            fix="start from it: --model.path with another --train.output_dir",
        )
    return source
