"""HF directory -> mrlhf checkpoint -> HF directory, one tensor at a time; under torchrun the ranks share the layers.

Nothing is renamed by hand here: the family's weight map says where each row of each HF tensor stands. A conversion there and
back without --dtype gives every file byte for byte. Both directions write under a temporary name, note what is done as they
go on (a killed conversion continues where it stood), and rename when all of it is on the disk. Memory: a few times the
largest tensor of the model on each rank.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
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
from mrlhf.checkpoint import manifest
from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.checkpoint.tensor_file import DistReader, DistWriter, Journal, Parameter, Skeleton
from mrlhf.config.options import ParallelConfig
from mrlhf.convert.model_card import model_card
from mrlhf.data.tokenizers.hf import load_tokenizer
from mrlhf.errors import CheckpointError, EnvironmentProblem, MrlhfError
from mrlhf.models import gpt
from mrlhf.models.families import HFTensor, classifier, hf_tensors
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.models.hf_files import HFReader, HFWriter, OutputFile, copy_side_files, plan_output
from mrlhf.parallel import device, state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {kind: name for name, kind in DTYPES.items()}
STAGE = "convert"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def start(spec: ModelSpec | None = None) -> ParallelConfig:
    """Groups for a conversion: every rank a pipeline stage, the last with what is left over. Raises EnvironmentProblem for more ranks than layers."""
    world, last = state.world_size(), None
    if spec is not None and spec.num_layers < world:
        raise EnvironmentProblem(f"{world} ranks cannot share {spec.num_layers} layers", expected=f"1 to {spec.num_layers} ranks")
    if spec is not None and spec.num_layers % world:
        last = spec.num_layers - (world - 1) * (spec.num_layers // world)
    parallel = ParallelConfig(pipeline_model_parallel_size=world, num_layers_in_last_pipeline_stage=last)
    if device.current().is_cuda:
        raise EnvironmentProblem("converters work in the machine's memory", fix="MRLHF_DEVICE=cpu")
    if not dist.is_initialized():
        state.initialize(parallel, seed=1)
    return parallel


def check_maps(skeleton: Skeleton, tensors: Mapping[str, HFTensor], spec: ModelSpec) -> None:
    """Every parameter is filled and every HF tensor used, each exactly once. Raises CheckpointError naming both sides. Collective."""
    empty, used = [], dict.fromkeys(tensors, 0)
    for p in skeleton.parameters:
        held = sorted((b.offset, b.offset + b.length) for b in p.blocks)
        size = p.shape[p.blocks[0].dim] if p.blocks else -1
        if p.name in ("embedding.word_embeddings.weight", "output_layer.weight") and size == spec.padded_vocab_size:
            size = spec.vocab_size  # padding rows belong to no HF tensor
        gaps = [end != begin for (_, end), (begin, _) in zip(held, held[1:], strict=False)]
        if not held or held[0][0] != 0 or held[-1][1] != size or any(gaps):
            empty.append(p.name)
        for b in p.blocks:
            other = 1
            for dim, n in enumerate(tensors[b.hf].shape):
                other *= b.length if dim == b.dim else n
            used[b.hf] += other
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (empty, used))
    empty = [name for names, _ in shares for name in names]
    wrong = [name for name, t in tensors.items() if sum(counts[name] for _, counts in shares) != torch.Size(t.shape).numel()]
    if empty or wrong:
        raise CheckpointError(
            f"the weight map of {spec.family} does not fit: Megatron parameters not filled once: {', '.join(empty[:5]) or 'none'}; "
            f"HF tensors not used once: {', '.join(wrong[:5]) or 'none'}",
            where=f"mrlhf/models/families ({spec.family})",
        )


@dataclass(frozen=True)
class _Work:
    """The temporary directory of a conversion, and this rank's journal in it."""

    directory: Path
    journal: Journal


@contextmanager
def _work(output: Path, fingerprint: Mapping[str, Any]) -> Iterator[_Work]:
    """A directory that is kept when the process is killed and removed where the user's input does not fit."""
    temporary, rank = output.with_name(output.name + ".tmp"), dist.get_rank()
    fingerprint = {"mrlhf": mrlhf.__version__, "ranks": dist.get_world_size(), **fingerprint}
    journal = temporary / f"progress_{rank}.jsonl"
    if rank == 0:
        first = journal.read_text().split("\n")[0] if journal.is_file() else ""
        if first != json.dumps(fingerprint, sort_keys=True):
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    try:
        made = _Work(temporary, Journal(journal, fingerprint))
        if made.journal.done and rank == 0:
            print(f"going on with {temporary}", file=sys.stderr)
        yield made
    except MrlhfError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _finish(work: _Work, output: Path, last: Callable[[Path], None]) -> None:
    """All ranks are done: `last` on rank 0, then everything to the disk and the final name."""
    dist.barrier()
    if dist.get_rank() == 0:
        for journal in work.directory.glob("progress_*.jsonl"):
            journal.unlink()
        last(work.directory)
        for file in work.directory.rglob("*"):
            manifest.fsync(file)
        os.rename(work.directory, output)
        manifest.fsync(output.parent)
    dist.barrier()


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise CheckpointError("the output exists", where=str(output), fix="another --output, or remove it first")


def _check_room(output: Path, nbytes: int) -> None:
    parent = next(p for p in (output.parent, *output.parent.parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(f"{nbytes / 2**30:.1f} GiB do not fit into the {free / 2**30:.1f} GiB that are free", where=str(parent))


def _left(
    skeleton: Skeleton, done: Container[str], read: Callable[[Parameter, torch.Tensor], None], *, label: str
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """The parameters that are not done with their values (`Skeleton.ahead`), and a bar on rank 0's terminal."""
    left = [p for p in skeleton.parameters if p.name not in done]
    off = dist.get_rank() != 0 or not sys.stderr.isatty()
    with tqdm(total=sum(p.nbytes for p in left), unit="B", unit_scale=True, unit_divisor=1024, desc=label, disable=off) as bar:
        for p, value in skeleton.ahead(left, read):
            yield p, value
            bar.update(p.nbytes)


@dataclass(frozen=True)
class Import:
    """What hf_to_megatron is about to do."""

    source: ModelSource
    reader: HFReader
    head: str
    dtype: str

    @property
    def output_bytes(self) -> int:
        spec = self.source.spec
        values = spec.num_parameters + (spec.padded_vocab_size - spec.vocab_size) * spec.hidden_size * (1 if spec.tied else 2)
        return values * DTYPES[self.dtype].itemsize

    def describe(self) -> list[str]:
        r = self.reader
        largest = max(r.tensors, key=r.nbytes)
        return [
            f"from    {self.source.path}: {self.source.spec.family}, {self.source.spec.num_parameters:,} parameters, head {self.source.head}",
            f"        {len(r.tensors)} tensors in {len(r.headers)} files, {sum(map(r.nbytes, r.tensors)) / 2**30:.2f} GiB; "
            f"largest {largest}, {r.nbytes(largest) / 2**30:.2f} GiB",
            f"to      a checkpoint with head {self.head} in {self.dtype}, {self.output_bytes / 2**30:.2f} GiB",
        ]


def plan_import(hf: str, *, head: str | None = None, dtype: str | None = None) -> Import:
    """Opens and checks everything that can be checked from headers. Raises CheckpointError."""
    source = open_source(hf)
    if source.is_checkpoint:
        raise CheckpointError("it is a mrlhf checkpoint already", where=str(source.path), expected="a HF directory or hub id")
    if head == "lm" and source.head == "value":
        raise CheckpointError("it holds a value model, which has no LM head", where=str(source.path), expected="an LM checkpoint")
    reader = HFReader(source.path, source.spec, head=source.head)
    types = {reader.dtype(name) for name, tensor in reader.tensors.items() if not tensor.in_fp32}
    return Import(source, reader, head or source.head, dtype or ("bfloat16" if types == {torch.bfloat16} else "float32"))


def hf_to_megatron(hf: str, output: Path, *, head: str | None = None, dtype: str | None = None, seed: int = 1) -> ModelSource:
    """Write the checkpoint `output` (weights only, readable under any layout) from a HF directory or hub id.

    head   "lm" or "value"; None: what the directory holds. A value head that is not there is drawn from `seed`
    dtype  "float32" or "bfloat16"; None: bfloat16 if every tensor is, else float32, which holds all that HF has

    Raises CheckpointError where the output exists or the tensors do not fit config.json.
    """
    _refuse_existing(output)
    plan = plan_import(hf, head=head, dtype=dtype)
    _check_room(output, plan.output_bytes)
    spec, reader, stored = plan.source.spec, plan.reader, DTYPES[plan.dtype]
    parallel = start(spec)
    skeleton = Skeleton(spec, parallel, head=plan.head, dtype=stored)
    check_maps(skeleton, hf_tensors(spec, head=plan.head), spec)
    drawn = gpt.RandomSource(spec, head=plan.head, seed=seed)
    extra: dict[str, Any] = {"converted_from": hf}
    if dtype is None:
        kinds = {name: _NAMES[reader.dtype(name)] for name in reader.tensors}
        usual = {name: "float32" if tensor.in_fp32 else plan.dtype for name, tensor in reader.tensors.items()}
        extra["hf_dtypes"] = {name: kind for name, kind in kinds.items() if kind != usual[name]}
    fingerprint = {"from": _files(plan.source.path, reader.headers), "head": plan.head, "dtype": dtype, "seed": seed}
    with _work(output, fingerprint) as work:
        if dist.get_rank() == 0:
            (work.directory / "dist").mkdir(exist_ok=True)
            copy_side_files(plan.source.hf_dir, work.directory / "hf")
        dist.barrier()
        writer = DistWriter(work.directory / "dist", skeleton, work.journal)

        def read(p: Parameter, value: torch.Tensor) -> None:
            if sum(b.length for b in p.blocks) < p.shape[p.blocks[0].dim]:
                value.zero_()  # padding rows of the vocabulary
            for b in p.blocks:
                part = value.narrow(b.dim, b.offset, b.length)
                if b.hf in reader.tensors:
                    reader.read_into(b, part)
                else:
                    part.copy_(drawn.read(b))  # a new value head

        for p, value in _left(skeleton, writer.done, read, label="to Megatron"):
            writer.write(p, value)
        reader.close()
        hashed = {f"dist/{name}": entry for name, entry in writer.finish().items()}
        _finish(
            work,
            output,
            lambda directory: manifest.write_manifest(
                directory, {"stage": STAGE, "step": 0, "head": plan.head, "dtype": plan.dtype, "resumable": False, **extra}, known=hashed
            ),
        )
    return open_source(str(output))


def _files(directory: Path, names: Iterable[str]) -> list[list[Any]]:
    """Path, size and time of the files that a conversion reads."""
    paths = [(directory / name).resolve() for name in sorted(names)]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


@dataclass(frozen=True)
class Export:
    """What megatron_to_hf wrote, or is about to write; `notes`: what its reader should know."""

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

    def describe(self) -> list[str]:
        spec = self.source.spec
        return [
            f"from    {self.source.path}: {spec.family}, {spec.num_parameters:,} parameters, head {self.source.head}, "
            f"{self.source.manifest['dtype']}, {self.source.manifest['stage']} step {self.source.manifest['step']}",
            f"to      {len(self.dtypes)} tensors in {len(self.files)} files, {self.output_bytes / 2**30:.2f} GiB: "
            + ", ".join(file.name for file in self.files[:3])
            + (" ..." if len(self.files) > 3 else ""),
            *(f"note    {note}" for note in self.notes),
        ]


def open_part(path: str, part: str) -> ModelSource:
    """The checkpoint at `path` (a run's directory: its latest), or its sub-model `part`, e.g. "critic"."""
    source = open_source(path)
    if not source.is_checkpoint:
        raise CheckpointError("not a mrlhf checkpoint", where=path, expected="a directory with mrlhf.json, or a run's directory")
    if not part:
        return source
    if not (source.path / part / manifest.MANIFEST).is_file():
        raise CheckpointError(f"it has no {part}", where=str(source.path), expected="a checkpoint of PPO with a critic (ppo.estimator gae)")
    return open_source(str(source.path / part))


def plan_export(path: str, output: Path, *, dtype: str | None = None, part: str = "") -> Export:
    """Opens and checks everything that can be checked without reading weights. Raises CheckpointError."""
    source = open_part(path, part)
    stored = source.manifest["dtype"]
    own = source.manifest.get("hf_dtypes") if dtype is None else None
    tensors = hf_tensors(source.spec, head=source.head)
    usual = dtype or stored
    dtypes = {name: DTYPES[(own or {}).get(name, "float32" if t.in_fp32 else usual)] for name, t in tensors.items()}
    config, notes = _hf_config(source, None if own is not None else dtype or stored)
    files, index = plan_output({name: (dtypes[name], t.stored_shape) for name, t in tensors.items()}, source.hf_dir)
    return Export(output, source, tuple(notes), tuple(files), index, config, dtypes)


def megatron_to_hf(path: str, output: Path, *, dtype: str | None = None, part: str = "") -> Export:
    """Write a HF directory from a checkpoint, whatever layout wrote it: safetensors, config, tokenizer, model card.

    dtype: "float32", "bfloat16" or "float16"; None: what the checkpoint holds (after hf_to_megatron without --dtype:
    each tensor's own). A value model becomes `...ForSequenceClassification` with one label. Files, index and the order in
    them are those of the HF directory that the model came from, where it has the same tensors. Raises CheckpointError.
    """
    _refuse_existing(output)
    plan = plan_export(path, output, dtype=dtype, part=part)
    _check_room(output, plan.output_bytes)
    source, tensors = plan.source, hf_tensors(plan.source.spec, head=plan.source.head)
    parallel = start(source.spec)
    skeleton = Skeleton(source.spec, parallel, head=source.head, dtype=DTYPES[source.manifest["dtype"]])
    check_maps(skeleton, tensors, source.spec)
    reader = DistReader(source.path / "dist")
    fingerprint = {"from": _files(source.path, source.manifest["files"]), "dtypes": [str(kind) for kind in plan.dtypes.values()]}
    with _work(output, fingerprint) as work:
        if dist.get_rank() == 0:
            HFWriter.create(work.directory, list(plan.files))
        dist.barrier()
        writer = HFWriter(work.directory, list(plan.files))
        for p, value in _left(skeleton, set(work.journal.done), reader.read, label="to HF"):
            parts = _hf_parts(p, value, tensors)
            written = sum(writer.write(name, _stored(name, tensor, tensors[name], plan.dtypes[name])) for name, tensor in parts)
            work.journal.add(p.name, written, writer.sync)
        work.journal.wait()
        writer.close()
        reader.close()

        def last(directory: Path) -> None:
            copy_side_files(source.hf_dir, directory, headers=False)
            if plan.config is not None:
                (directory / "config.json").write_text(json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
            if plan.index is not None:
                (directory / "model.safetensors.index.json").write_text(plan.index)
            if source.manifest["stage"] != STAGE:  # else it is somebody's model with their card, or none
                (directory / "README.md").write_text(model_card(source))

        _finish(work, output, last)
    return plan


def _hf_parts(p: Parameter, value: torch.Tensor, tensors: Mapping[str, HFTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The HF tensors that a whole parameter holds, each as [out, in]; of one that stands there in one piece a view."""
    for name in dict.fromkeys(b.hf for b in p.blocks):
        blocks = [b for b in p.blocks if b.hf == name]
        first = blocks[0]
        if len(blocks) == 1:
            yield name, value.narrow(first.dim, first.offset, first.length)
            continue
        tensor = torch.empty(tensors[name].shape, dtype=value.dtype)
        for b in blocks:
            tensor.narrow(b.dim, b.start, b.length).copy_(value.narrow(b.dim, b.offset, b.length))
        yield name, tensor


def _stored(name: str, tensor: torch.Tensor, kind: HFTensor, dtype: torch.dtype) -> torch.Tensor:
    """As the file has it. Raises CheckpointError where a finite value has no finite counterpart in its dtype (float16)."""
    found = (tensor.t() if kind.transposed else tensor).to(dtype)
    if dtype == torch.float16 and not found.isfinite().all():
        raise CheckpointError(f"{name} has values beyond float16's 65504", where="--dtype", fix="--dtype bfloat16")
    return found


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
    loaded = load_tokenizer(hf_dir)
    pad = config.get("pad_token_id")
    if pad is None:
        pad = loaded.pad_token_id
    if pad is not None and pad == loaded.eos_token_id:
        notes.append(
            f"pad_token_id set to null: {pad} also closes sequences, and transformers would score the token before it; batch size 1 only"
        )
        pad = None
    return {} if pad == config.get("pad_token_id") else {"pad_token_id": pad}
