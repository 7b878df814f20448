"""What a checkpoint keeps of its run, and what must still be so when the run goes on: configuration, data, tokenizer."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mrlhf.config.load import diff, load_config
from mrlhf.config.options import TrainingConfig
from mrlhf.data.blend import Dataset, sources_of
from mrlhf.data.order import Order
from mrlhf.data.tokenizers.hf import fingerprint
from mrlhf.errors import CheckpointError, ConfigError, DataError, Problems
from mrlhf.observe.redaction import redact
from mrlhf.parallel.state import Layout

# what may differ between the first command and the one that resumes it
_FREE_TO_CHANGE = (
    "parallel.", "logging.", "checkpoint.", "train.output_dir", "train.eval_interval", "train.allow_changes", "train.exit_duration_minutes",
)  # fmt: skip
DATA, TOKENIZER = "data", "tokenizer"  # in train.allow_changes, beside keys of the configuration


def check_resume(config: TrainingConfig, output_dir: Path) -> None:
    """Refuse to go on with a run under another configuration, showing what differs."""
    before = output_dir / "config.yaml"
    if before.is_file():
        free = (*_FREE_TO_CHANGE, *config.train.allow_changes)
        changed = [line for line in diff(load_config(type(config), str(before), []), config) if not line.startswith(free)]
        if changed:
            keys = ", ".join(dict.fromkeys(line.partition(":")[0] for line in changed))
            raise ConfigError(
                f"the run in {output_dir} was started with another configuration: {'; '.join(changed)}",
                where="train.output_dir",
                expected=f"the same, or --train.allow_changes '[{keys}]' where the change is meant",
                fix="the first command again, or another --train.output_dir",
            )


def describe_run(stage: str, config: TrainingConfig, layout: Layout, hf_dir: Path) -> dict[str, Any]:
    """What every manifest of a run says: stage, dtype, layout, configuration, tokenizer, versions."""
    return {
        "stage": stage,
        "dtype": config.model.dtype,
        "layout": {**asdict(layout), "dp": layout.dp, "virtual_pp": config.parallel.virtual_pipeline_model_parallel_size},
        "config": redact(asdict(config)),
        "tokenizer": _fingerprint(hf_dir),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")}},
    }


def _fingerprint(hf_dir: Path) -> str | None:
    try:
        return fingerprint(hf_dir)
    except DataError:  # pretraining on Megatron-LM's own text needs no tokenizer
        return None


def data_position(order: Order, data: Dataset, consumed: list[int]) -> dict[str, Any]:
    """What a checkpoint keeps of the data: for each source what it is and how many of its rows were met."""
    parts = zip(sources_of(data), order.mix.rows, consumed, strict=True)
    return {"data": [{"prefix": d.prefix, "identity": d.identity, "rows": rows, "consumed": n} for d, rows, n in parts]}


def go_on(
    order: Order,
    data: Dataset,
    manifest: dict[str, Any],
    *,
    where: str,
    position: int | None = None,
    hf_dir: Path | None = None,
    allowed: Collection[str] = (),
) -> None:
    """Bring the order to a checkpoint's position (None: that of its step).

    hf_dir: of the model that the run starts from; its tokenizer must be the checkpoint's. allowed: train.allow_changes.
    Raises CheckpointError where data or tokenizer are not what the checkpoint was trained on, all differences at once.
    """
    kept = manifest.get("data")
    if kept is None:
        return
    problems = Problems()
    for before, now, rows in zip(kept, sources_of(data), order.mix.rows, strict=True):
        if (before["identity"], before["rows"]) != (now.identity, rows) and DATA not in allowed:
            problems.add(
                CheckpointError(
                    f"the data at {now.prefix} was changed since this checkpoint: the rows that are left would be others",
                    where=where,
                    expected=f"{before['prefix']} as it was ({before['rows']:,} rows, {before['identity'][:12]}), "
                    f"not {rows:,} rows, {now.identity[:12]}",
                    fix=f"bring that data back, or --train.allow_changes '[{DATA}]', or start anew: --model.path with another --train.output_dir",
                )
            )
    tokenizer, ours = manifest.get("tokenizer"), _fingerprint(hf_dir) if hf_dir is not None else None
    if tokenizer is not None and ours is not None and tokenizer != ours and TOKENIZER not in allowed:
        problems.add(
            CheckpointError(
                f"the tokenizer of {hf_dir} is not the checkpoint's: {tokenizer[:12]} -> {ours[:12]}",
                where=where,
                fix=f"bring that tokenizer back, or --train.allow_changes '[{TOKENIZER}]'",
            )
        )
    problems.raise_if_any()
    consumed = [source["consumed"] for source in kept]
    try:
        if allowed:
            order.rebase(manifest["step"], sum(consumed))
        order.resume_at(order.position(manifest["step"]) if position is None else position, None if DATA in allowed else consumed)
    except ValueError as error:
        raise CheckpointError(f"its data position cannot be right: {error}", where=where, fix="take an earlier checkpoint") from error
