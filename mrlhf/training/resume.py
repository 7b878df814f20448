"""The run's part of a checkpoint's manifest, and the check of a resumed run's configuration."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mrlhf.checkpoint.manifest import newest_whole, read_manifest, steps_in
from mrlhf.config.dump import diff, stage_of
from mrlhf.config.foreign import read_json
from mrlhf.config.load import load_config
from mrlhf.config.options import DataSource, TrainingConfig
from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.observe.directory import DirectoryLock
from mrlhf.observe.redaction import redact
from mrlhf.parallel import state
from mrlhf.parallel.state import Layout
from mrlhf.training.batches import tokenizer_fingerprint_or_none

# Keys, and beginnings of keys, that may differ between the first command and the one that resumes the run. They say
# where and when it runs, what it holds in memory and what it writes, and change its numbers by rounding only.
FREE_TO_CHANGE = (
    "parallel.", "logging.", "checkpoint.", "offload.", "data.verify", "train.output_dir", "train.eval_interval",
    "train.allow_changes", "train.deterministic", "train.exit_duration_minutes", "train.loss_spike_threshold",
    "train.micro_batch_size", "train.max_tokens_per_micro_batch", "ptx.micro_batch_size", "dpo.reference",
    "optim.use_distributed_optimizer", "ppo.critic_tensor_model_parallel_size",
    "ppo.critic_pipeline_model_parallel_size", "rollout.tensor_parallel_size", "rollout.placement",
    "rollout.num_ranks", "rollout.kv_cache_mib", "rollout.max_num_seqs", "rollout.reshard_bucket_mib", "rollout.sleep",
    "rollout.environment_threads", "rollout.environment_timeout_s", "rollout.mismatch_warning",
    "rollout.samples_to_log", "reward.function_", "reward.http_", "ppo.ratio_tolerance",
)


def open_directory(config: TrainingConfig) -> DirectoryLock | None:
    """Before anything is written: checks the run's directory, and on rank 0 takes it. Raises ConfigError where it holds
    another run, where another process writes there, or where it cannot be written.
    """
    directory = Path(config.train.output_dir)
    check_resume(config, directory)
    if not state.is_main():
        return None
    return DirectoryLock(directory / "lock", key="train.output_dir", patience_s=3.0,
                         fix="wait until that run ends, or end it; else another --train.output_dir")


def _stage_in(output_dir: Path) -> str | None:
    """The stage of the run that a directory holds, None for no run."""
    before = output_dir / "config.yaml"
    if before.is_file():
        return stage_of(before.read_text(encoding="utf-8", errors="replace"))
    newest, _ = newest_whole(steps_in(output_dir / "checkpoints"), verify="size")
    return None if newest is None else read_manifest(newest).get("stage")


def _cwd_of(output_dir: Path) -> str:
    """The directory in which the run was started, which its relative paths belong to."""
    try:
        return str(read_json(output_dir / "env.json", nan=True)["cwd"])
    except (CheckpointError, KeyError):
        return os.getcwd()


def _same(cwd: str, old: Any, new: Any) -> bool:
    """Whether two values of an option are equal, or name one path (`old` from within `cwd`)."""
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return all(_same(cwd, a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, DataSource) and isinstance(new, DataSource):
        return _same(cwd, old.prefix, new.prefix) and replace(old, prefix="") == replace(new, prefix="")
    if isinstance(old, str) and isinstance(new, str) and old != new:
        return os.path.realpath(os.path.join(cwd, old)) == os.path.realpath(new)
    return old == new


def check_resume(config: TrainingConfig, output_dir: Path) -> None:
    """Raises ConfigError if the run in `output_dir` is of another stage or has another configuration, with all
    differences.
    """
    stage = _stage_in(output_dir)
    if stage not in (None, config.stage):
        raise ConfigError(f"{output_dir} holds a run of {stage}", where="train.output_dir",
                          expected=f"a new directory, or one of {config.stage}", fix="another --train.output_dir")
    before = output_dir / "config.yaml"
    if before.is_file():
        free = (*FREE_TO_CHANGE, *config.train.allow_changes)
        lines = diff(load_config(type(config), str(before), []), config, same=partial(_same, _cwd_of(output_dir)))
        changed = [line for line in lines if not line.startswith(free)]
        if changed:
            keys = ", ".join(dict.fromkeys(line.partition(":")[0] for line in changed))
            raise ConfigError(f"the run in {output_dir} was started with another configuration: {'; '.join(changed)}",
                              where="train.output_dir",
                              expected=f"the same, or --train.allow_changes '[{keys}]' if the change is intended",
                              fix="the first command again, or another --train.output_dir")


def run_manifest(config: TrainingConfig, layout: Layout, hf_dir: Path) -> dict[str, Any]:
    """The manifest entries that all checkpoints of a run share: stage, dtype, layout, configuration, versions, ..."""
    return {"stage": config.stage, "dtype": config.model.dtype,
            "layout": {**asdict(layout), "dp": layout.dp,
                       "virtual_pp": config.parallel.virtual_pipeline_model_parallel_size},
            "config": redact(asdict(config)), "tokenizer": tokenizer_fingerprint_or_none(hf_dir),
            "versions": {"python": platform.python_version(),
                         **{name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")}}}
