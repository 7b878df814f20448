"""Opens checkpoints and fills models from them. save.py shows what a checkpoint holds, manifest.py when it is whole."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint import rng
from mrlhf.checkpoint.manifest import MANIFEST, await_files, check_manifest, newest_whole, steps_in
from mrlhf.checkpoint.megatron_lm import TRACKER, find_tensors
from mrlhf.checkpoint.optimizer_state import open_dist
from mrlhf.checkpoint.reader import DistReader
from mrlhf.checkpoint.shards import Sharding
from mrlhf.errors import CheckpointError
from mrlhf.models.families import spec_from_hf
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.models.hf_files import HFReader, is_value_model, resolve_hf, side_files, untie

log = logging.getLogger(__name__)



@dataclass(frozen=True)
class ModelSource:
    """A model on disk: a checkpoint of mrlhf or Megatron-LM, or a HF directory (then `manifest` is empty)."""

    path: Path
    hf_dir: Path
    spec: ModelSpec
    head: str
    manifest: dict[str, Any]
    dist: Path | None = None  # where the tensors of a checkpoint are

    @property
    def is_checkpoint(self) -> bool:
        return bool(self.manifest)

    @cached_property
    def dtype(self) -> str:
        """What holds the weights without loss: "bfloat16" if all of them are bfloat16, else "float32"."""
        if self.is_checkpoint:
            return self.manifest["dtype"]
        reader = HFReader(self.path, self.spec, head=self.head)
        types = {reader.dtype(name) for name, tensor in reader.tensors.items() if not tensor.in_fp32}
        reader.close()
        return "bfloat16" if types == {torch.bfloat16} else "float32"


def _newest(directory: Path) -> Path | None:
    """The newest checkpoint in a directory of checkpoints or a run's directory, whole or not."""
    return next(iter([*steps_in(directory), *steps_in(directory / "checkpoints")]), None)


def open_source(path: str, *, verify: str = "size") -> ModelSource:
    """A mrlhf checkpoint, a run's directory (its newest checkpoint), its checkpoints/best, a HF directory or a hub id.

    verify: "size" or "hash", see manifest.damaged_files. Raises CheckpointError where `path` is none of these, or a
    file is missing or damaged: it never takes another checkpoint silently (only a run's own resume does: `to_resume`).
    """
    directory = Path(path)
    if directory.name in ("best", "latest") and directory.is_file():
        name = directory.read_text().strip()
        directory = directory.parent / name if re.fullmatch(r"step_\d+", name) else directory
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        directory = _newest(directory) or directory
    if (directory / MANIFEST).is_file() or (directory / "dist").is_dir():
        manifest = check_manifest(directory, verify=verify)
        hf_dir = directory / "hf"
        spec = spec_from_hf(read_hf_config(hf_dir), where=str(hf_dir / "config.json"))
        return ModelSource(directory, hf_dir, spec, manifest["head"], manifest, directory / "dist")
    if directory.is_dir() and (dist := find_tensors(directory)) is not None:
        return _open_megatron(directory, dist)
    directory = resolve_hf(path)
    if not (directory / "config.json").is_file():
        expected = f"a directory with {MANIFEST}, checkpoints/, {TRACKER} or config.json"
        raise CheckpointError("neither a checkpoint nor a HF model", where=path, expected=expected)
    side_files(directory)
    config = read_hf_config(directory)
    spec = spec_from_hf(config, where=str(directory / "config.json"))
    if is_value_model(config):
        return ModelSource(directory, directory, spec, "value", {})
    return ModelSource(directory, directory, untie(directory, spec), "lm", {})


def _open_megatron(directory: Path, dist: Path) -> ModelSource:
    """A checkpoint that Megatron-LM has written: of its pickles only the index is read, so its architecture comes from
    a HF config.json.
    """
    hf_dir = next((d for d in (directory / "hf", dist / "hf", dist.parent / "hf", directory, dist)
                   if (d / "config.json").is_file()), None)
    if hf_dir is None:
        fix = f"copy config.json and the tokenizer's files of the model's HF directory to {directory / 'hf'}"
        raise CheckpointError("a checkpoint of Megatron-LM without a HF config.json", where=str(directory),
                              expected=f"{directory / 'hf' / 'config.json'}", fix=fix)
    spec = spec_from_hf(read_hf_config(hf_dir), where=str(hf_dir / "config.json"))
    reader = DistReader(dist)
    if "output_layer.weight" in reader.dtypes:
        spec = replace(spec, tied=False)
    rows = reader.rows("embedding.word_embeddings.weight")
    if rows < spec.vocab_size:
        what = f"its vocabulary has {rows:,} rows, that of {hf_dir / 'config.json'} {spec.vocab_size:,}"
        raise CheckpointError(what, where=str(dist), expected="the config.json of the same model")
    dtype = "bfloat16" if reader.dtypes["embedding.word_embeddings.weight"] == torch.bfloat16 else "float32"
    manifest = {"stage": "convert", "step": 0, "dtype": dtype, "resumable": False}
    return ModelSource(directory, hf_dir, spec, "lm", manifest, dist)


def load_weights(source: ModelSource, models: list[Any], *, head: str, seed: int) -> None:
    """Fills this rank's model chunks from `source`.

    A value model takes everything but its head from an LM, and draws its head from `seed`. Raises CheckpointError for
    the other direction: a value model has no LM head.
    """
    from mrlhf.models import gpt

    if head == "lm" and source.head == "value":
        what = "it holds a value model, which has no LM head"
        raise CheckpointError(what, where=str(source.path), expected="an LM checkpoint")
    new_head = head == "value" and source.head == "lm"
    if source.is_checkpoint:
        shards = Sharding(models).weights()
        wanted = (s for s in shards if not (new_head and s.key.startswith("output_layer.")))
        assert source.dist is not None
        stored = open_dist(source.dist) if "files" in source.manifest else DistReader(source.dist)
        stored.fill(wanted)
        stored.close()
    else:
        reader = HFReader(source.path, source.spec, head=source.head)
        values = _WithNewHead(reader, gpt.RandomSource(source.spec, head=head, seed=seed)) if new_head else reader
        for model in models:
            gpt.fill(model, source.spec, values, head=head)
        reader.close()
    if new_head and source.is_checkpoint:
        for model in models:
            random = gpt.RandomSource(source.spec, head=head, seed=seed)
            gpt.fill(model, source.spec, random, head=head, only="output_layer.")


@dataclass(frozen=True)
class _WithNewHead:
    """The tensors of a HF model, and a value head that is drawn."""

    reader: HFReader
    head: Any

    def read(self, block: Any) -> torch.Tensor:
        return (self.head if block.hf == "score.weight" else self.reader).read(block)


def to_resume(run_dir: Path, *, total_steps: int, verify: str = "size") -> ModelSource | None:
    """Collective. The newest whole checkpoint of a run, None for a new run; warns of damaged ones that it passes over.

    Raises CheckpointError where no checkpoint is whole (a run never starts over by itself), and where the run is not
    finished and the checkpoint has weights only.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box = [newest_whole(steps_in(run_dir / "checkpoints"), verify=verify)]
    dist.broadcast_object_list(box, src=0)
    newest, problems = box[0]
    what = "; ".join(f"{p.where}: {p.what}" for p in problems)
    if newest is None and problems:
        fix = "bring one back, or start anew with another --train.output_dir"
        where = str(run_dir / "checkpoints")
        raise CheckpointError(f"no checkpoint of this run is whole: {what}", where=where, fix=fix)
    if newest is None:
        return None
    if problems and dist.get_rank() == 0:
        log.warning(f"not whole, passed over: {what}; going on from {newest}")
    await_files(newest)
    source = open_source(str(newest))
    if source.manifest["step"] < total_steps and not source.manifest["resumable"]:
        what = f"it has weights only and stands at step {source.manifest['step']} of {total_steps}"
        expected = "a checkpoint with optimizer state (checkpoint.save_optimizer)"
        fix = "start from it: --model.path with another --train.output_dir"
        raise CheckpointError(what, where=str(source.path), expected=expected, fix=fix)
    return source


def restore_randomness(source: ModelSource) -> None:
    """Restores this rank's random generators if the run still has as many ranks; otherwise they stay as seeded."""
    if source.manifest.get("layout", {}).get("world") == dist.get_world_size():
        path = source.path / f"rng/rank_{dist.get_rank()}.json"
        try:
            rng.restore(path.read_text())
        except Exception as error:  # each generator refuses a wrong state in its own way
            what = f"not the states of random generators: {type(error).__name__}: {error}"
            fix = f"move {source.path.name} away; the same command then goes on from the checkpoint before it"
            raise CheckpointError(what, where=str(path), fix=fix) from error
