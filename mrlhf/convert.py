"""HF directory -> mrlhf checkpoint -> HF directory, and the check that both compute the same. One process.

Nothing is renamed by hand here: the family's weight map says where each row of each HF tensor stands. A
conversion there and back without --dtype gives every tensor bit for bit and every side file byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
import torch.distributed as dist

from mrlhf import checkpoint, tokenizer
from mrlhf.checkpoint import ModelSource, open_source
from mrlhf.config import ParallelConfig
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.engine import Model
from mrlhf.errors import CheckpointError, EnvironmentProblem
from mrlhf.models import gpt
from mrlhf.models.families import classifier, hf_shapes
from mrlhf.models.families import hf_tensors as hf_tensors_of
from mrlhf.models.hf_io import HFReader, copy_side_files, write_safetensors
from mrlhf.models.spec import ModelSpec, read_hf_config
from mrlhf.parallel import state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {kind: name for name, kind in DTYPES.items()}
TOLERANCE = 1e-4  # of a logit in fp32; a wrong mapping is off by 1e-1 and more
STAGE = "convert"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_VERIFY_LENGTHS = (5, 23, 12, 48)


def _start() -> None:
    if state.world_size() > 1:
        raise EnvironmentProblem(f"{state.world_size()} processes", expected="one: a converter runs without torchrun")
    if not dist.is_initialized():
        state.initialize(ParallelConfig(), seed=1)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise CheckpointError("the output exists", where=str(output), fix="another --output, or remove it first")


def hf_to_megatron(hf: str, output: Path, *, head: str | None = None, dtype: str | None = None, seed: int = 1) -> ModelSource:
    """Write the checkpoint `output` (weights only, readable under any layout) from a HF directory or hub id.

    head   "lm" or "value"; None: what the directory holds. A value head that is not there is drawn from `seed`
    dtype  "float32" or "bfloat16"; None: bfloat16 if every tensor is, else float32, which holds all that HF has

    Raises CheckpointError where the output exists or the tensors do not fit config.json. Memory: the model once.
    """
    _start()
    _refuse_existing(output)
    source = open_source(hf)
    if source.is_checkpoint:
        raise CheckpointError("it is a mrlhf checkpoint already", where=str(source.path), expected="a HF directory or hub id")
    reader = HFReader(source.path, source.spec, head=source.head)
    found = {name: _NAMES[reader.dtype(name)] for name in reader.tensors}
    stored = dtype or ("bfloat16" if set(found.values()) == {"bfloat16"} else "float32")
    extra: dict[str, Any] = {"converted_from": hf}
    if dtype is None:
        extra["hf_dtypes"] = {name: kind for name, kind in found.items() if kind != stored}
    kind = head or source.head
    model = Model(source, ParallelConfig(), head=kind, dtype=stored, seed=seed)
    part = checkpoint.Part("", model.module, None, kind, source.hf_dir)
    checkpoint.save(output, [part], stage=STAGE, step=0, dtype=stored, extra=extra)
    return open_source(str(output))


@torch.no_grad()
def hf_tensors(
    model: torch.nn.Module, spec: ModelSpec, *, head: str, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    """HF's tensors of a model that this process holds whole, one at a time, without padding rows.

    Raises CheckpointError where a finite value has no finite counterpart in its dtype (float16).
    """
    holders: dict[str, list[tuple[torch.Tensor, gpt.Block]]] = {}
    for _, parameter, blocks in gpt.local_blocks(model, spec, head=head):
        for block in blocks:
            holders.setdefault(block.hf, []).append((parameter, block))
    for name, shape in hf_shapes(spec, head=head).items():
        tensor, covered = torch.empty(shape, dtype=dtypes[name]), 0
        for parameter, b in holders[name]:
            tensor.narrow(b.dim, b.start, b.length).copy_(parameter.narrow(b.dim, b.offset, b.length))
            covered += b.length
            split = shape[b.dim]
        assert covered == split, f"{name}: {covered} of {split} rows"
        if dtypes[name] == torch.float16 and not tensor.isfinite().all():
            raise CheckpointError(f"{name} has values beyond float16's 65504", where="--dtype", fix="--dtype bfloat16")
        yield name, tensor.t() if hf_tensors_of(spec, head=head)[name].transposed else tensor


@dataclass(frozen=True)
class Export:
    """What megatron_to_hf wrote; `notes`: what its reader should know."""

    path: Path
    source: ModelSource
    notes: tuple[str, ...]


def open_part(path: str, part: str) -> ModelSource:
    """The checkpoint at `path` (a run's directory: its latest), or its sub-model `part`, e.g. "critic"."""
    source = open_source(path)
    if not source.is_checkpoint:
        raise CheckpointError("not a mrlhf checkpoint", where=path, expected="a directory with mrlhf.json, or a run's directory")
    if not part:
        return source
    if not (source.path / part / checkpoint.MANIFEST).is_file():
        raise CheckpointError(f"it has no {part}", where=str(source.path), expected="a checkpoint of PPO with a critic (ppo.estimator gae)")
    return open_source(str(source.path / part))


def megatron_to_hf(path: str, output: Path, *, dtype: str | None = None, part: str = "") -> Export:
    """Write a HF directory from a checkpoint, whatever layout wrote it: safetensors, config, tokenizer.

    dtype: "float32", "bfloat16" or "float16"; None: what the checkpoint holds (after hf_to_megatron without --dtype:
    each tensor's own). A value model becomes `...ForSequenceClassification` with one label.
    Raises CheckpointError. Memory: the model once and one shard of at most 5 GiB.
    """
    _start()
    _refuse_existing(output)
    source = open_part(path, part)
    stored = source.manifest["dtype"]
    own = source.manifest.get("hf_dtypes") if dtype is None else None
    names = hf_shapes(source.spec, head=source.head)
    dtypes = {name: DTYPES[dtype or (own or {}).get(name, stored)] for name in names}
    model = Model(source, ParallelConfig(), head=source.head, dtype=stored, seed=1)
    config, notes = _hf_config(source, None if own is not None else dtype or stored)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        copy_side_files(source.hf_dir, temporary)
        if config is not None:
            (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_safetensors(temporary, hf_tensors(model.module, source.spec, head=source.head, dtypes=dtypes))
        for file in temporary.iterdir():
            checkpoint.fsync(file)
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    checkpoint.fsync(output.parent)
    return Export(output, source, tuple(notes))


def _hf_config(source: ModelSource, dtype: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json for the export or None where the checkpoint's own fits, notes). `dtype` None: the config's stays."""
    config = read_hf_config(source.hf_dir)
    changes: dict[str, Any] = {}
    notes: list[str] = []
    key = "dtype" if "dtype" in config else "torch_dtype"
    if dtype is not None and config.get(key) != dtype:
        changes[key] = dtype
    if source.head == "value":
        wanted = classifier(source.spec)
        if not wanted:
            raise CheckpointError(f"transformers has no class for a value model of {source.spec.family}", where=str(source.path))
        if config.get("architectures") != [wanted]:
            changes |= {"architectures": [wanted], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        changes |= _padding(config, source.hf_dir, notes)
        if "reward_mean" in source.manifest:
            mean, std = source.manifest["reward_mean"], source.manifest["reward_std"]
            notes.append(f"scores are raw; normalised = (score - {mean:.6g}) / {std:.6g}, which config.json has no place for")
    return ({**config, **changes} if changes else None), notes


def _padding(config: Mapping[str, Any], hf_dir: Path, notes: list[str]) -> dict[str, int | None]:
    """transformers scores the last token that is not `pad_token_id`: it must be known, and must not close sequences."""
    if not any((hf_dir / file).is_file() for file in _TOKENIZER_FILES):  # transformers makes up a tokenizer of one id then
        notes.append(f"pad_token_id stays {config.get('pad_token_id')}: the checkpoint has no tokenizer")
        return {}
    loaded = tokenizer.load(hf_dir)
    pad = config.get("pad_token_id")
    if pad is None:
        pad = loaded.pad_token_id
    if pad is not None and pad == loaded.eos_token_id:
        notes.append(
            f"pad_token_id set to null: {pad} also closes sequences, and transformers would score the token before it; batch size 1 only"
        )
        pad = None
    return {} if pad == config.get("pad_token_id") else {"pad_token_id": pad}


@dataclass(frozen=True)
class Comparison:
    """Differences of logits (or scores) over random tokens, packed and unpacked."""

    what: str
    max_abs: float
    mean_abs: float
    count: int

    @property
    def ok(self) -> bool:
        return self.max_abs <= TOLERANCE  # False for nan

    def describe(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        return (
            f"{self.what}: max |difference| {self.max_abs:.3e}, mean {self.mean_abs:.3e} of {self.count:,} values; "
            f"tolerance {TOLERANCE:g}: {verdict}"
        )


def verify(source: ModelSource, hf: str, *, seed: int = 0) -> Comparison:
    """Run the checkpoint (packed and unpacked) and plain transformers on the same random tokens, in fp32.

    Where one side is stored in a narrower dtype, both are rounded to it: the mapping is checked, not the rounding.
    A value model is compared by its scores, or, beside a HF LM, by its head over transformers' hidden states.
    Raises CheckpointError where the two are models of different shape. Memory: the model once in fp32 on either side.
    """
    _start()
    theirs = open_source(hf)
    if theirs.is_checkpoint:
        raise CheckpointError("it is a mrlhf checkpoint", where=hf, expected="a HF directory")
    if theirs.spec != source.spec:
        raise CheckpointError(f"{source.path} and {theirs.path} are different models", expected=f"{source.spec}", where=f"{theirs.spec}")
    if theirs.head == "value" and source.head == "lm":
        raise CheckpointError("the HF directory holds a value model, the checkpoint an LM", where=hf)
    rng = np.random.default_rng(seed)
    pad = read_hf_config(theirs.hf_dir).get("pad_token_id")
    ids = np.array([i for i in range(min(source.spec.vocab_size, 1 << 20)) if i != pad])
    limit = source.spec.max_position_embeddings
    samples = [Sample(rng.choice(ids, min(n, limit)), np.ones(min(n, limit), np.uint8), i) for i, n in enumerate(_VERIFY_LENGTHS)]

    reader = HFReader(theirs.path, theirs.spec, head=theirs.head)
    stored = DTYPES[source.manifest["dtype"]] if source.is_checkpoint else torch.float32
    ours, head_1H = _megatron_outputs(
        source, samples, {name: reader.dtype(name) for name in reader.tensors}
    )
    wanted = _hf_outputs(theirs, samples, stored, head_1H)
    worst, total, count = 0.0, 0.0, 0
    for packing in (True, False):
        for mine, other in zip(ours[packing], wanted, strict=True):
            difference = (mine[-other.size(0) :] - other).abs()
            worst, total, count = max(worst, float(difference.max())), total + float(difference.double().sum()), count + difference.numel()
            if not difference.isfinite().all():
                worst = float("nan")
    what = "logits" if source.head == "lm" else "scores" if theirs.head == "value" else "values"
    return Comparison(what, worst, total / count, count)


@torch.no_grad()
def _megatron_outputs(
    source: ModelSource, samples: list[Sample], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[bool, list[torch.Tensor]], torch.Tensor | None]:
    """({packing: [T, V] or [T, 1] of each sample}, the value head's weight)."""
    spec, head = source.spec, source.head
    model = Model(source, ParallelConfig(), head=head, dtype="float32", seed=1)
    for _, parameter, blocks in gpt.local_blocks(model.module, spec, head=head):
        for b in blocks:
            view = parameter.narrow(b.dim, b.offset, b.length)
            view.copy_(view.to(dtypes.get(b.hf, torch.float32)))
    channels = spec.vocab_size if head == "lm" else 1

    def outputs(out_BTW: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return out_BTW[..., :channels].float().permute(2, 0, 1)

    found = {}
    for packing in (True, False):
        batch = collate(samples, packing=packing)
        per_channel = [batch.split(x_BT.cpu()) for x_BT in model.forward([batch], outputs, channels=channels)[0]]
        found[packing] = [torch.stack(of_sample, dim=-1) for of_sample in zip(*per_channel, strict=True)]
    return found, model.parameters()["output_layer.weight"].cpu() if head == "value" else None


@torch.no_grad()
def _hf_outputs(theirs: ModelSource, samples: list[Sample], stored: torch.dtype, head_1H: torch.Tensor | None) -> list[torch.Tensor]:
    """[T, V] logits or [T, 1] values of each sample; [1, 1] where the directory has a score head of its own."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if theirs.head == "value" else AutoModelForCausalLM
    model = kind.from_pretrained(theirs.path, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    found = []
    for sample in samples:
        ids_1T = torch.from_numpy(sample.tokens)[None]
        if head_1H is not None and theirs.head == "lm":
            found.append(model.model(ids_1T).last_hidden_state[0] @ head_1H.T)
        else:
            found.append(model(ids_1T).logits.reshape(-1, 1) if theirs.head == "value" else model(ids_1T).logits[0])
    return found
