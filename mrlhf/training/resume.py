"""The run's part of a checkpoint's manifest, and the check of a resumed run's configuration."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mrlhf.config.dump import diff
from mrlhf.config.load import load_config
from mrlhf.config.options import TrainingConfig
from mrlhf.errors import ConfigError
from mrlhf.observe.redaction import redact
from mrlhf.parallel.state import Layout
from mrlhf.training.batches import tokenizer_fingerprint_or_none

# Keys, and beginnings of keys, that may differ between the first command and the one that resumes the run. They say
# where and when it runs, what it holds in memory and what it writes, and change its numbers by rounding only.
FREE_TO_CHANGE = (
    "parallel.", "logging.", "checkpoint.", "offload.", "train.output_dir", "train.eval_interval",
    "train.allow_changes", "train.exit_duration_minutes", "train.loss_spike_threshold", "train.micro_batch_size",
    "train.max_tokens_per_micro_batch", "ptx.micro_batch_size", "dpo.reference", "optim.use_distributed_optimizer",
    "ppo.critic_tensor_model_parallel_size", "ppo.critic_pipeline_model_parallel_size",
    "rollout.tensor_parallel_size", "rollout.placement", "rollout.num_ranks", "rollout.kv_cache_mib",
    "rollout.max_num_seqs", "rollout.reshard_bucket_mib", "rollout.sleep", "rollout.environment_threads",
    "rollout.environment_timeout_s", "rollout.mismatch_warning", "rollout.samples_to_log", "reward.function_",
    "reward.http_", "ppo.ratio_tolerance",
)


def check_resume(config: TrainingConfig, output_dir: Path) -> None:
    """Raises ConfigError, with all differences, if the run in `output_dir` has another configuration."""
    before = output_dir / "config.yaml"
    if before.is_file():
        free = (*FREE_TO_CHANGE, *config.train.allow_changes)
        changed = [
            line for line in diff(load_config(type(config), str(before), []), config) if not line.startswith(free)
        ]
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
