"""The rows of every step, this rank's BatchPlan for them, and the data position in a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mrlhf.config.options import TrainingConfig
from mrlhf.data.batching import BatchPlan
from mrlhf.data.blend import Dataset, names_of, rows_of, sources_of
from mrlhf.data.order import Mix, Order
from mrlhf.data.tokenizers.hf import fingerprint
from mrlhf.errors import CheckpointError, DataError, Problems
from mrlhf.parallel.state import Groups, pad_multiple, slice_multiple

_FEW_STEPS = 10
DATA, TOKENIZER = "data", "tokenizer"  # names in train.allow_changes beside configuration keys


def make_order(config: TrainingConfig, data: Dataset) -> Order:
    """The order of a run: the rows of every step."""
    rows = [rows_of(source, packing=config.data.packing) for source in sources_of(data)]
    mix = Mix.from_weights(rows, [s.weight for s in config.data.train], [s.epochs for s in config.data.train])
    return Order(mix, global_batch_size=config.train.global_batch_size, num_epochs=config.train.num_epochs,
                 max_steps=config.train.max_steps, seed=config.train.seed, shuffle=config.data.shuffle)


def step_contents(config: TrainingConfig, data: Dataset) -> str:
    """What a step takes: a row may be a pack of several samples."""
    rows, packed = config.train.global_batch_size, config.data.packing
    kind, each = ("pairs", 2) if data.task == "preference" else ("samples", 1)
    count = rows * data.num_samples / each / data.num_packs
    return f"{rows:,} packs, about {count:,.0f} {kind}, a step" if packed else f"{rows:,} {kind} a step"


def few_steps_warning(config: TrainingConfig, order: Order, data: Dataset) -> str | None:
    """Of a run that ends after hardly a step, which nobody has asked for; None for others."""
    if order.total_steps >= _FEW_STEPS or config.train.max_steps is not None:
        return None
    return (f"the run ends after {order.total_steps} step(s): train.global_batch_size takes "
            f"{step_contents(config, data)}, and the data has {order.mix.pass_rows:,} rows")


def source_epochs(order: Order, data: Dataset, consumed: list[int]) -> dict[str, float]:
    """data/<source>/epoch of a blend: passes over each source after `consumed` of its rows; {} without a blend."""
    parts = sources_of(data)
    if len(parts) == 1:
        return {}
    counts = zip(names_of([p.prefix for p in parts]), consumed, order.mix.rows, strict=True)
    return {f"data/{name}/epoch": n / rows for name, n, rows in counts}


def tokenizer_fingerprint_or_none(hf_dir: Path) -> str | None:
    """The tokenizer's fingerprint. None without one: pretraining on Megatron-LM's own data needs none."""
    try:
        return fingerprint(hf_dir)
    except DataError:
        return None


def data_position(order: Order, data: Dataset, consumed: list[int]) -> dict[str, Any]:
    """The manifest's entry: identity, number of rows and consumed rows of each source."""
    parts = zip(sources_of(data), order.mix.rows, consumed, strict=True)
    return {"data": [{"prefix": d.prefix, "identity": d.identity, "rows": rows, "consumed": n} for d, rows, n in parts]}


def restore_position(order: Order, data: Dataset, manifest: dict[str, Any], *, where: str, position: int | None = None,
                     hf_dir: Path | None = None, allowed: Collection[str] = ()) -> None:
    """Moves the order to a checkpoint's position (None: the position of its step).

    hf_dir: the model that the run starts from; its tokenizer must equal the checkpoint's. allowed: train.allow_changes.
    Raises CheckpointError, with all differences together, if data or tokenizer changed since the checkpoint.
    """
    sources = manifest.get("data")
    if sources is None:
        return
    problems = Problems()
    if DATA not in allowed:
        problems.extend(_changed_data(order, data, sources, where))
    theirs, ours = manifest.get("tokenizer"), tokenizer_fingerprint_or_none(hf_dir) if hf_dir is not None else None
    if theirs is not None and ours is not None and theirs != ours and TOKENIZER not in allowed:
        what = f"the tokenizer of {hf_dir} is not the checkpoint's: {theirs[:12]} -> {ours[:12]}"
        fix = f"bring that tokenizer back, or --train.allow_changes '[{TOKENIZER}]'"
        problems.add(CheckpointError(what, where=where, fix=fix))
    problems.raise_if_any()
    consumed = [source["consumed"] for source in sources]
    try:
        if allowed:
            order.rebase(manifest["step"], sum(consumed))
        start = order.position(manifest["step"]) if position is None else position
        order.resume_at(start, None if DATA in allowed else consumed)
    except ValueError as error:
        what = f"its data position is wrong: {error}"
        fix = f"move {os.path.basename(where)} away; the same command then goes on from the checkpoint before it"
        raise CheckpointError(what, where=where, fix=fix) from error


def _changed_data(order: Order, data: Dataset, sources: list[dict[str, Any]], where: str) -> list[CheckpointError]:
    problems = []
    for before, now, rows in zip(sources, sources_of(data), order.mix.rows, strict=True):
        if (before["identity"], before["rows"]) != (now.identity, rows):
            was = f"{before['prefix']} as it was ({before['rows']:,} rows, {before['identity'][:12]})"
            problems.append(
                CheckpointError(
                    f"the data at {now.prefix} was changed since this checkpoint: the remaining rows would be others",
                    where=where,
                    expected=f"{was}, not {rows:,} rows, {now.identity[:12]}",
                    fix=f"bring that data back, or --train.allow_changes '[{DATA}]', "
                    "or start anew: --model.path with another --train.output_dir",
                )
            )
    return problems


def make_batch_plan(groups: Groups, *, packing: bool, micro_batch_size: int, max_tokens: int | None = None,
                    padding_side: str = "right") -> BatchPlan:
    """The plan of this rank in `groups`."""
    return BatchPlan(packing=packing, micro_batch_size=micro_batch_size, max_tokens=max_tokens, dp_rank=groups.dp_rank,
                     dp_size=groups.layout.dp, pad_multiple=pad_multiple(groups.parallel),
                     micro_batch_multiple=slice_multiple(groups.parallel), padding_side=padding_side)


def training_batch_plan(config: TrainingConfig, groups: Groups) -> BatchPlan:
    """A training stage's plan for this rank in `groups`. A critic may have separate groups."""
    data, train = config.data, config.train
    return make_batch_plan(groups, packing=data.packing, micro_batch_size=train.micro_batch_size,
                           max_tokens=train.max_tokens_per_micro_batch, padding_side=data.padding_side)
