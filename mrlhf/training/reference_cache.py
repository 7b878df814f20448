"""Reference log-probs of DPO: computed once and stored beside the data, so that later runs read them.

    PREFIX_reference_<16 digits of the reference's fingerprint>.safetensors
        "logps" float32 [samples]: each answer's log-prob, summed over its trained tokens

The metadata identifies data and reference (with its dtype) and has the SHA-256 of the values. A run that needs other
values, or finds a damaged file, computes them again. A blend has one file beside each of its sources.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mrlhf.checkpoint.manifest import file_entry, fsync
from mrlhf.checkpoint.source import ModelSource
from mrlhf.data.blend import Dataset
from mrlhf.parallel import state

log = logging.getLogger(__name__)


def model_fingerprint(source: ModelSource, *, dtype: str) -> str:
    """SHA-256 over a model's config and weight files and the dtype of the run. Collective.

    The ranks divide the files among them (about 1.5 GB/s each). A checkpoint with optimizer state has another
    fingerprint than the same weights without it.
    """
    weights = source.dist or source.path
    files = [
        source.hf_dir / "config.json",
        *sorted(p for p in weights.iterdir() if p.is_file() and (source.is_checkpoint or p.suffix == ".safetensors")),
    ]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [(i, file_entry(files[i])["sha256"]) for i in range(rank, len(files), world)]
    digests = [digest for _, digest in sorted(state.from_all_ranks(mine))]
    names = [file.name for file in files]
    return hashlib.sha256(repr((names, digests, dtype)).encode()).hexdigest()


def read_logps(path: Path, *, facts: dict[str, str], samples: int) -> torch.Tensor | str | None:
    """The log-probs [samples] of a file, None without a file, or a text that says what is wrong with it."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, logps = file.metadata() or {}, file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({error})"
    for name, value in facts.items():
        if metadata.get(name) != value:
            return f"is of another {name}"
    if tuple(logps.shape) != (samples,) or metadata.get("sha256") != _values_sha256(logps):
        return "is damaged: its values are not those that were written"
    return logps


def _values_sha256(logps: torch.Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def write_logps(path: Path, logps: torch.Tensor, *, facts: dict[str, str]) -> None:
    """Writes atomically: temporary name, fsync, rename. Raises OSError if the directory is not writable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # raises OSError, where safetensors would raise an error of its own
    temporary.touch()
    try:
        save_file({"logps": logps.contiguous()}, temporary, metadata={**facts, "sha256": _values_sha256(logps)})
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def cache_paths(data: Dataset, run_dir: Path, reference: str) -> list[Path]:
    """Possible files for one data set: beside the data; in the run's directory, if the former is not writable."""
    beside = Path(f"{data.prefix}_reference_{reference[:16]}.safetensors")
    return [beside, run_dir / f"{beside.stem}_{data.identity[:16]}.safetensors"]


def cached_logps(data: Dataset, *, reference: str, run_dir: Path, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Log-probs [samples] of one data set, on every rank: from an intact file, else from `compute`, and then stored.

    Collective, like `compute`.
    """
    facts = {"data": data.identity, "reference": reference}
    box: list[torch.Tensor | None] = [None]
    if state.is_main():
        for path in cache_paths(data, run_dir, reference):
            stored = read_logps(path, facts=facts, samples=data.num_samples)
            if isinstance(stored, torch.Tensor):
                log.info(f"reference log-probs: {path}")
                box = [stored]
                break
            if stored is not None:
                log.info(f"reference log-probs: {path} {stored}; computing it again")
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        return box[0]
    log.info(f"computing reference log-probs of {data.num_samples:,} answers of {data.prefix}")
    logps = compute()
    if state.is_main():
        write_to_first(cache_paths(data, run_dir, reference), logps, facts=facts)
    return logps


def write_to_first(paths: list[Path], logps: torch.Tensor, *, facts: dict[str, str]) -> Path:
    """Writes the first of `paths`, or else the second, with a line in the log. Returns the one written."""
    first, last = paths
    try:
        write_logps(first, logps, facts=facts)
        return first
    except OSError as error:
        why = f"{first.parent} is not writable ({error.strerror})"
        log.info(f"{why}: reference log-probs go to {last}, for this run alone")
    last.parent.mkdir(parents=True, exist_ok=True)
    write_logps(last, logps, facts=facts)
    return last
