"""Opening checkpoints and filling models from them. What lies in one: saving.py; what makes it whole: manifest.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint import rng
from mrlhf.checkpoint.manifest import MANIFEST, await_files, check, newest_whole, steps_in
from mrlhf.checkpoint.safe_pickle import check_directory, read_metadata
from mrlhf.errors import CheckpointError
from mrlhf.models.families import spec_from_hf
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.models.hf_files import HFReader, resolve_hf

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


def _newest(directory: Path) -> Path | None:
    """The newest checkpoint in a directory of checkpoints or a run's directory, whole or not."""
    found = [*steps_in(directory), *steps_in(directory / "checkpoints")]
    return found[0] if found else None


def open_source(path: str, *, verify: str = "size") -> ModelSource:
    """A mrlhf checkpoint, a run's directory (its newest checkpoint), its checkpoints/best, a HF directory or a hub id.

    verify: "size" or "hash", see manifest.damage. Raises CheckpointError when it is none of them or its files are not all as they were
    written: another checkpoint than the one asked for is never taken silently (a run's own resume falls back: `to_resume`).
    """
    directory = Path(path)
    if directory.name in ("best", "latest") and directory.is_file() and re.fullmatch(r"step_\d+", name := directory.read_text().strip()):
        directory = directory.parent / name
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        directory = _newest(directory) or directory
    if (directory / MANIFEST).is_file() or (directory / "dist").is_dir():
        manifest = check(directory, verify=verify)
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


def sharding_metadata(model: Any) -> dict[str, Any]:
    return {"distrib_optim_sharding_type": _OPTIMIZER_FORMAT, "dp_cp_group": model.pg_collection.dp_cp}


def sharded(models: list[Any]) -> dict[str, Any]:
    """State of this rank's parts of the model; on disk names have no part in them, so any number of parts reads any other's."""
    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    return {name: model.sharded_state_dict(metadata=sharding_metadata(model)) for name, model in zip(names, models, strict=True)}


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
        state = sharded(models)
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
    from mrlhf.parallel.state import on_any_rank

    spread = on_any_rank(len(optimizer.chained_optimizers) > 1)
    check_optimizer_names(read_metadata(directory / "dist").state_dict_metadata, spread=spread, where=str(directory))
    state = sharded(models)
    parts, weights = list(state), state["model"] if len(models) == 1 else dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=sharding_metadata(models[0]))
    with torch.no_grad():
        loaded = _dist_load(state, directory / "dist")
        for part, model in zip(parts, models, strict=True):
            model.load_state_dict(loaded[part])
        optimizer.load_state_dict(loaded["optimizer"])


def to_resume(run_dir: Path, *, total_steps: int, verify: str = "size") -> ModelSource | None:
    """Collective. The newest whole checkpoint of a run; None for a new run. Rank 0 looks, and says which ones are damaged and passed over.

    Raises CheckpointError where there are checkpoints and none is whole (a run never begins again by itself), and where the run is not
    finished and the checkpoint cannot be gone on from (weights only).
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box = [newest_whole(steps_in(run_dir / "checkpoints"), verify=verify)]
    dist.broadcast_object_list(box, src=0)
    found, problems = box[0]
    what = "; ".join(f"{p.where}: {p.what}" for p in problems)
    if found is None:
        if problems:
            raise CheckpointError(
                f"no checkpoint of this run is whole: {what}",
                where=str(run_dir / "checkpoints"),
                fix="bring one back, or start anew with another --train.output_dir",
            )
        return None
    if problems and dist.get_rank() == 0:
        print(f"warning: not whole, passed over: {what}; going on from {found}", file=sys.stderr, flush=True)
    await_files(found)
    source = open_source(str(found))
    if source.manifest["step"] < total_steps and not source.manifest["resumable"]:
        raise CheckpointError(
            f"it has weights only and stands at step {source.manifest['step']} of {total_steps}",
            where=str(source.path),
            expected="a checkpoint with optimizer state (checkpoint.save_optimizer)",
            fix="start from it: --model.path with another --train.output_dir",
        )
    return source


def restore_randomness(source: ModelSource) -> None:
    """This rank's generators as they were, where as many ranks go on as have saved; on another layout they stay as the seed made them."""
    if source.manifest.get("layout", {}).get("world") == dist.get_world_size():
        rng.restore((source.path / f"rng/rank_{dist.get_rank()}.json").read_text())
