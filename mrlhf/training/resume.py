"""What a checkpoint keeps of its run, and the configuration that a resumed run must have."""

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
from mrlhf.training.row_order import tokenizer_fingerprint_or_none

# what may differ between the first command and the one that resumes it
_FREE_TO_CHANGE = ("parallel.", "logging.", "checkpoint.", "train.output_dir", "train.eval_interval",
                   "train.allow_changes", "train.exit_duration_minutes")


def check_resume(config: TrainingConfig, output_dir: Path) -> None:
    """Refuse to go on with a run under another configuration, showing what differs."""
    before = output_dir / "config.yaml"
    if before.is_file():
        free = (*_FREE_TO_CHANGE, *config.train.allow_changes)
        changed = [
            line for line in diff(load_config(type(config), str(before), []), config) if not line.startswith(free)
        ]
        if changed:
            keys = ", ".join(dict.fromkeys(line.partition(":")[0] for line in changed))
            raise ConfigError(f"the run in {output_dir} was started with another configuration: {'; '.join(changed)}",
                              where="train.output_dir",
                              expected=f"the same, or --train.allow_changes '[{keys}]' where the change is meant",
                              fix="the first command again, or another --train.output_dir")


def run_manifest(config: TrainingConfig, layout: Layout, hf_dir: Path) -> dict[str, Any]:
    """The part of a manifest that is the same for every checkpoint of a run: stage, dtype, layout, configuration,
    tokenizer, versions.
    """
    return {"stage": config.stage, "dtype": config.model.dtype,
            "layout": {**asdict(layout), "dp": layout.dp,
                       "virtual_pp": config.parallel.virtual_pipeline_model_parallel_size},
            "config": redact(asdict(config)), "tokenizer": tokenizer_fingerprint_or_none(hf_dir),
            "versions": {"python": platform.python_version(),
                         **{name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")}}}
