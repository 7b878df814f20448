"""HF directory -> mrlhf checkpoint -> HF directory, one tensor at a time; under torchrun the ranks share the layers.

The family's weight map says where each row of each HF tensor belongs. A conversion to mrlhf and back without --dtype
reproduces every file byte for byte. Both directions write to a temporary directory with a journal of finished
parameters (a killed conversion continues from it), and rename the directory when all data is on the disk. Memory per
rank: a few times the model's largest tensor.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
import torch.distributed as dist

import mrlhf
from mrlhf.checkpoint import manifest, megatron_lm
from mrlhf.checkpoint.reader import DistReader
from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.checkpoint.tensor_file import DistWriter, Journal, Parameter, Skeleton, read_parameter
from mrlhf.config.options import ParallelConfig
from mrlhf.convert.hf_config import export_config
from mrlhf.convert.model_card import model_card
from mrlhf.errors import CheckpointError, EnvironmentProblem, MrlhfError
from mrlhf.models import gpt
from mrlhf.models.families import HFTensor, hf_tensors
from mrlhf.models.families.spec import ModelSpec
from mrlhf.models.hf_files import INDEX, HFReader, HFWriter, OutputFile, copy_side_files, plan_output
from mrlhf.observe.directory import DirectoryLock, directory_problem
from mrlhf.parallel import device, state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STAGE = "convert"
log = logging.getLogger(__name__)


def initialize_groups(spec: ModelSpec | None = None) -> ParallelConfig:
    """Process groups for a conversion: each rank is a pipeline stage, and the last one takes the remaining layers.

    Raises EnvironmentProblem for more ranks than layers, and on a GPU.
    """
    world, last = state.world_size(), None
    if spec is not None:
        layers = spec.num_layers
        if layers < world:
            raise EnvironmentProblem(f"{world} ranks cannot share {layers} layers", expected=f"1 to {layers} ranks")
        last = layers - (world - 1) * (layers // world) if layers % world else None
    parallel = ParallelConfig(pipeline_model_parallel_size=world, num_layers_in_last_pipeline_stage=last)
    if device.current().is_cuda:
        raise EnvironmentProblem("converters work in host memory", fix="MRLHF_DEVICE=cpu")
    if not dist.is_initialized():
        state.initialize(parallel, seed=1)
    return parallel


def check_weight_map(skeleton: Skeleton, tensors: Mapping[str, HFTensor], spec: ModelSpec) -> None:
    """Checks that the map fills every parameter and uses every HF tensor, each exactly once. Collective.

    Raises CheckpointError naming the wrong parameters and tensors.
    """
    unfilled, used = [], dict.fromkeys(tensors, 0)
    for p in skeleton.parameters:
        held = sorted((s.offset, s.offset + s.length) for s in p.blocks)
        size = p.shape[p.blocks[0].dim] if p.blocks else -1
        if p.name in ("embedding.word_embeddings.weight", "output_layer.weight") and size == spec.padded_vocab_size:
            size = spec.vocab_size  # padding rows belong to no HF tensor
        gaps = any(end != begin for (_, end), (begin, _) in zip(held, held[1:], strict=False))
        if not held or held[0][0] != 0 or held[-1][1] != size or gaps:
            unfilled.append(p.name)
        for s in p.blocks:
            shape = tensors[s.hf].shape
            used[s.hf] += math.prod(shape) // shape[s.dim] * s.length
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (unfilled, used))
    unfilled = [name for names, _ in by_rank for name in names]
    wrong = [name for name, t in tensors.items() if sum(u[name] for _, u in by_rank) != math.prod(t.shape)]
    if unfilled or wrong:
        raise CheckpointError(
            f"the weight map of {spec.family} does not fit: Megatron parameters not filled once: "
            f"{', '.join(unfilled[:5]) or 'none'}; HF tensors not used once: {', '.join(wrong[:5]) or 'none'}",
            where=f"mrlhf/models/families ({spec.family})",
        )


def _lock(temporary: Path, output: Path) -> DirectoryLock:
    lock = DirectoryLock(temporary / "lock", key=f"--output {output}", kind=CheckpointError,
                         fix="wait until it ends, or another --output")
    try:
        _refuse_existing(output)  # another process may just have finished it
    except CheckpointError:
        lock.release()
        raise
    return lock


@contextmanager
def _work_directory(output: Path, fingerprint: Mapping[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """The temporary directory of a conversion, and this rank's journal in it.

    The directory is locked, stays if the process is killed, and is removed if the input turns out not to fit. A
    directory of an earlier conversion is continued if it has the same fingerprint, else it is replaced.
    """
    temporary, rank = output.with_name(output.name + ".tmp"), dist.get_rank()
    fingerprint = {"mrlhf": mrlhf.__version__, "ranks": dist.get_world_size(), **fingerprint}
    file = temporary / f"progress_{rank}.jsonl"
    lock, error = None, None
    if rank == 0:
        try:
            lock = _lock(temporary, output)
        except MrlhfError as caught:
            error = caught
    if state.on_any_rank(rank == 0 and lock is None):
        raise error or CheckpointError("rank 0 cannot write the output", where=str(output))
    if lock is not None:
        first = file.read_text().split("\n")[0] if file.is_file() else ""
        for old in temporary.iterdir() if first != json.dumps(fingerprint, sort_keys=True) else ():
            if old != lock.file:
                manifest.remove(old)
    dist.barrier()
    try:
        journal = Journal(file, fingerprint)
        if journal.done and rank == 0:
            log.warning(f"continuing the conversion in {temporary}")
        yield temporary, journal
    except MrlhfError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


def _finish(directory: Path, output: Path, write_last: Callable[[Path], None]) -> None:
    """Waits for all ranks; then rank 0 calls `write_last`, flushes all files to the disk, and renames the directory."""
    dist.barrier()
    if dist.get_rank() == 0:
        for own in (*directory.glob("progress_*.jsonl"), directory / "lock"):
            own.unlink()
        write_last(directory)
        for file in directory.rglob("*"):
            manifest.fsync(file)
        os.rename(directory, output)
        manifest.fsync(output.parent)
    dist.barrier()


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise CheckpointError("the output exists", where=str(output), fix="another --output, or move it away first")


def _check_disk_space(output: Path, nbytes: int) -> None:
    if (problem := directory_problem(output.parent, key="--output")) is not None:
        raise problem
    parent = next(p for p in (output.parent, *output.parent.parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        what = f"{nbytes / 2**30:.1f} GiB do not fit into the {free / 2**30:.1f} GiB that are free"
        raise CheckpointError(what, where=str(parent))


def _remaining(
    skeleton: Skeleton, done: Container[str], read: Callable[[Parameter, torch.Tensor], None], *, label: str
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """The parameters that are not done, each with its value; a progress bar on rank 0's terminal."""
    left = [p for p in skeleton.parameters if p.name not in done]
    off = dist.get_rank() != 0 or not sys.stderr.isatty()
    total = sum(p.nbytes for p in left)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=label, disable=off) as bar:
        for p, value in skeleton.read_ahead(left, read):
            yield p, value
            bar.update(p.nbytes)


@dataclass(frozen=True)
class ImportPlan:
    """What hf_to_megatron would do."""

    source: ModelSource
    reader: HFReader
    head: str
    dtype: str

    @property
    def output_bytes(self) -> int:
        spec = self.source.spec
        padding = (spec.padded_vocab_size - spec.vocab_size) * spec.hidden_size * (1 if spec.tied else 2)
        return (spec.num_parameters + padding) * DTYPES[self.dtype].itemsize

    def summary(self) -> list[str]:
        r, spec = self.reader, self.source.spec
        largest, total = max(r.tensors, key=r.nbytes), sum(map(r.nbytes, r.tensors))
        return [
            f"from    {self.source.path}: {spec.family}, {spec.num_parameters:,} parameters, head {self.source.head}",
            f"        {len(r.tensors)} tensors in {len(r.headers)} files, {total / 2**30:.2f} GiB; "
            f"largest {largest}, {r.nbytes(largest) / 2**30:.2f} GiB",
            f"to      a checkpoint with head {self.head} in {self.dtype}, {self.output_bytes / 2**30:.2f} GiB",
        ]


def plan_import(hf: str, *, head: str | None = None, dtype: str | None = None) -> ImportPlan:
    """Opens the input and checks everything that headers tell. Raises CheckpointError."""
    source = open_source(hf)
    where = str(source.path)
    if source.is_checkpoint:
        raise CheckpointError("it is a mrlhf checkpoint already", where=where, expected="a HF directory or hub id")
    if head == "lm" and source.head == "value":
        raise CheckpointError("it holds a value model, which has no LM head", where=where, expected="an LM checkpoint")
    reader = HFReader(source.path, source.spec, head=source.head)
    return ImportPlan(source, reader, head or source.head, dtype or source.dtype)


def hf_to_megatron(
    hf: str, output: Path, *, head: str | None = None, dtype: str | None = None, seed: int = 1
) -> ModelSource:
    """Writes the checkpoint `output` (weights only, loads under any layout) from a HF directory or hub id.

    head   "lm" or "value"; None: as in the directory. A missing value head is initialised from `seed`
    dtype  "float32" or "bfloat16"; None: bfloat16 if every tensor is bfloat16, else float32, which loses nothing

    Raises CheckpointError if the output exists or the tensors do not fit config.json.
    """
    _refuse_existing(output)
    plan = plan_import(hf, head=head, dtype=dtype)
    _check_disk_space(output, plan.output_bytes)
    spec, reader, stored = plan.source.spec, plan.reader, DTYPES[plan.dtype]
    parallel = initialize_groups(spec)
    skeleton = Skeleton(spec, parallel, head=plan.head, dtype=stored)
    check_weight_map(skeleton, hf_tensors(spec, head=plan.head), spec)
    new_head = gpt.RandomSource(spec, head=plan.head, seed=seed)
    extra: dict[str, Any] = {"converted_from": hf}
    if dtype is None:
        kinds = {name: str(reader.dtype(name)).removeprefix("torch.") for name in reader.tensors}
        usual = {name: "float32" if tensor.in_fp32 else plan.dtype for name, tensor in reader.tensors.items()}
        extra["hf_dtypes"] = {name: kind for name, kind in kinds.items() if kind != usual[name]}
    files = _file_states(plan.source.path, reader.headers)
    fingerprint = {"from": files, "head": plan.head, "dtype": dtype, "seed": seed}
    with _work_directory(output, fingerprint) as (directory, journal):
        if dist.get_rank() == 0:
            (directory / "dist").mkdir(exist_ok=True)
            copy_side_files(plan.source.hf_dir, directory / "hf")
        dist.barrier()
        writer = DistWriter(directory / "dist", skeleton, journal)

        def read(p: Parameter, value: torch.Tensor) -> None:
            if sum(s.length for s in p.blocks) < p.shape[p.blocks[0].dim]:
                value.zero_()  # padding rows of the vocabulary
            for s in p.blocks:
                part = value.narrow(s.dim, s.offset, s.length)
                if s.hf in reader.tensors:
                    reader.read_into(s, part)
                else:
                    part.copy_(new_head.read(s))

        for p, value in _remaining(skeleton, writer.done, read, label="to Megatron"):
            writer.write(p, value)
        reader.close()
        hashed = {f"dist/{name}": entry for name, entry in writer.finish().items()}
        entries = {"stage": STAGE, "step": 0, "head": plan.head, "dtype": plan.dtype, "resumable": False, **extra}

        def write_last(path: Path) -> None:
            if plan.head == "lm":
                megatron_lm.add_names(path, step=0)
            manifest.write_manifest(path, entries, known=hashed)

        _finish(directory, output, write_last)
    return open_source(str(output))


def _file_states(directory: Path, names: Iterable[str]) -> list[list[Any]]:
    """Path, size and modification time of the files that a conversion reads."""
    paths = [(directory / name).resolve() for name in sorted(names)]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


@dataclass(frozen=True)
class ExportPlan:
    """What megatron_to_hf wrote or would write. notes: lines for the user; config: None keeps the checkpoint's own."""

    path: Path
    source: ModelSource
    notes: tuple[str, ...]
    files: tuple[OutputFile, ...]
    index: str | None
    config: dict[str, Any] | None
    dtypes: dict[str, torch.dtype]

    @property
    def output_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def summary(self) -> list[str]:
        source, spec, count = self.source, self.source.spec, len(self.files)
        names = ", ".join(file.name for file in self.files[:3]) + (" ..." if count > 3 else "")
        return [
            f"from    {source.path}: {spec.family}, {spec.num_parameters:,} parameters, head {source.head}, "
            f"{source.manifest['dtype']}, {source.manifest['stage']} step {source.manifest['step']}",
            f"to      {len(self.dtypes)} tensors in {count} files, {self.output_bytes / 2**30:.2f} GiB: {names}",
            *(f"note    {note}" for note in self.notes),
        ]


def open_part(path: str, part: str) -> ModelSource:
    """The model of the checkpoint at `path` (a run's directory: its latest), or PPO's other model `part`, "critic"."""
    source = open_source(path)
    if not source.is_checkpoint:
        expected = "a directory with mrlhf.json, a run's directory, or one of Megatron-LM"
        raise CheckpointError("not a mrlhf checkpoint", where=path, expected=expected)
    if part == "actor":
        return source
    if not (source.path / part / manifest.MANIFEST).is_file():
        expected = "a checkpoint of PPO with a critic (ppo.estimator gae)"
        raise CheckpointError(f"it has no {part}", where=str(source.path), expected=expected)
    return open_source(str(source.path / part))


def plan_export(path: str, output: Path, *, dtype: str | None = None, part: str = "actor") -> ExportPlan:
    """Opens the checkpoint and checks everything except the weights. Raises CheckpointError."""
    source = open_part(path, part)
    own = source.manifest.get("hf_dtypes") if dtype is None else None
    tensors = hf_tensors(source.spec, head=source.head)
    usual = dtype or source.manifest["dtype"]
    dtypes = {name: DTYPES[(own or {}).get(name, "float32" if t.in_fp32 else usual)] for name, t in tensors.items()}
    config, notes = export_config(source, None if own is not None else usual)
    files, index = plan_output({name: (dtypes[name], t.stored_shape) for name, t in tensors.items()}, source.hf_dir)
    return ExportPlan(output, source, tuple(notes), tuple(files), index, config, dtypes)


def megatron_to_hf(path: str, output: Path, *, dtype: str | None = None, part: str = "actor") -> ExportPlan:
    """Writes a HF directory from a checkpoint of any layout: safetensors, config, tokenizer, model card.

    dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's (after hf_to_megatron without --dtype: each
    tensor's own). A value model becomes `...ForSequenceClassification` with one label. Files, index and the order of
    tensors are those of the HF directory that the model came from, if it has the same tensors. Raises CheckpointError.
    """
    _refuse_existing(output)
    plan = plan_export(path, output, dtype=dtype, part=part)
    _check_disk_space(output, plan.output_bytes)
    source, tensors = plan.source, hf_tensors(plan.source.spec, head=plan.source.head)
    parallel = initialize_groups(source.spec)
    skeleton = Skeleton(source.spec, parallel, head=source.head, dtype=DTYPES[source.manifest["dtype"]])
    check_weight_map(skeleton, tensors, source.spec)
    assert source.dist is not None
    reader = DistReader(source.dist)
    read = functools.partial(read_parameter, reader)
    files = _file_states(source.dist, [f.name for f in source.dist.iterdir()])
    fingerprint = {"from": files, "dtypes": list(map(str, plan.dtypes.values()))}
    with _work_directory(output, fingerprint) as (directory, journal):
        if dist.get_rank() == 0:
            HFWriter.create(directory, list(plan.files))
        dist.barrier()
        writer = HFWriter(directory, list(plan.files))
        for p, value in _remaining(skeleton, set(journal.done), read, label="to HF"):
            written = 0
            for name, tensor in _hf_parts(p, value, tensors):
                written += writer.write(name, _stored_form(name, tensor, tensors[name], plan.dtypes[name]))
            journal.add(p.name, written, writer.sync)
        journal.wait()
        writer.close()
        reader.close()

        def write_last(path: Path) -> None:
            copy_side_files(source.hf_dir, path, headers=False)
            if plan.config is not None:
                (path / "config.json").write_text(json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
            if plan.index is not None:
                (path / INDEX).write_text(plan.index)
            if source.manifest["stage"] != STAGE:  # a converted model keeps its own card, if it has one
                _write_card(path / "README.md", source)

        _finish(directory, output, write_last)
    return plan


def _write_card(file: Path, source: ModelSource) -> None:
    """A card is made of files that anyone may have changed since the run; without it the weights are as good."""
    try:
        file.write_text(model_card(source), encoding="utf-8")
    except Exception:
        log.warning(f"the export of {source.path} has no model card:\n{traceback.format_exc()}")


def _hf_parts(p: Parameter, value: torch.Tensor, tensors: Mapping[str, HFTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The HF tensors that an unsharded parameter holds, each as [out, in]; a view if one slice is the tensor."""
    for name in dict.fromkeys(s.hf for s in p.blocks):
        parts = {s: value.narrow(s.dim, s.offset, s.length) for s in p.blocks if s.hf == name}
        if len(parts) == 1:
            yield name, next(iter(parts.values()))
            continue
        tensor = torch.empty(tensors[name].shape, dtype=value.dtype)
        for s, part in parts.items():
            tensor.narrow(s.dim, s.start, s.length).copy_(part)
        yield name, tensor


def _stored_form(name: str, tensor: torch.Tensor, kind: HFTensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as the file stores it. Raises CheckpointError if a value overflows float16."""
    stored = (tensor.t() if kind.transposed else tensor).to(dtype)
    if dtype == torch.float16 and not stored.isfinite().all():
        raise CheckpointError(f"{name} has values beyond float16's 65504", where="--dtype", fix="--dtype bfloat16")
    return stored
