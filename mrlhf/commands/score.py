"""`mrlhf score`: log-probs of every token, or the value head's scores, of a data set under a checkpoint.

One line a sample (a pair for preference data) in data order, the same under any layout, packed or padded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split

from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import ScoreStage
from mrlhf.data.blend import Dataset
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.errors import CheckpointError, ConfigError, Problems
from mrlhf.models.families.spec import check_layout
from mrlhf.parallel import device, state
from mrlhf.training.batch_plan import make_batch_plan
from mrlhf.training.preflight import open_data
from mrlhf.training.scoring import score_micro_batches
from mrlhf.training.trainer import Model

Found = dict[int, Any]  # sample index -> float32 log-probs [T - 1], or a score


def check(config: ScoreStage, world: int) -> tuple[ModelSource, Dataset]:
    """Opens model and data. Raises every problem found, together."""
    problems = Problems()
    source = None
    try:
        source = open_source(config.checkpoint)
    except CheckpointError as error:
        problems.add(
            CheckpointError(error.what, where=f"checkpoint: {error.where or config.checkpoint}", expected=error.expected, fix=error.fix)
        )
    if source is not None:
        for wrong in check_layout(config.parallel, source.spec, world, trained=False):
            problems.add(wrong)
    if config.temperature <= 0:
        problems.add(ConfigError(f"temperature = {config.temperature} has no log-probs", where="temperature", expected="above 0"))
    if config.padding_side == "left":
        if config.packing:
            problems.add(ConfigError("padding_side = left needs packing false", where="padding_side", fix="--packing false"))
        if source is not None and source.head == "lm":
            problems.add(
                ConfigError("padding_side = left is for value heads; this checkpoint is an LM", where="padding_side", expected="right")
            )
    data, found = open_data(config.data, key="data", task=None, source=source, seq_length=None)
    for problem in found:
        problems.add(problem)
    if Path(config.output).is_dir():
        problems.add(ConfigError(f"output = {config.output} is a directory", where="output", expected="a file to write"))
    problems.raise_if_any()
    assert source is not None and data is not None
    return source, data


def token_logprobs(model: Model, batches: list[MicroBatch], *, temperature: float) -> list[list[torch.Tensor]]:
    """Of every micro-batch and sample: log p of its tokens 1 .. T-1, [T - 1]."""

    def per_token(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return model.logprobs(hidden_BTH, batch, temperature=temperature).logps[None]

    outputs = model.forward(batches, per_token, channels=1)
    return [[of_sample[:-1] for of_sample in batch.split(logps_1BT[0].cpu())] for batch, logps_1BT in zip(batches, outputs, strict=True)]


def _slices(config: ScoreStage, model: Model, loader: Loader) -> Iterator[Found]:
    """Collective. Results of all data-parallel ranks, on rank 0, slice by slice of the data in order; elsewhere empty."""
    for rows in loader.in_order():
        batches = loader.micro_batches(rows)
        if model.head == "value":
            per_batch: list[list[Any]] = [scores_N.tolist() for scores_N in score_micro_batches(model, batches)]
        else:
            per_batch = [[t.numpy() for t in samples] for samples in token_logprobs(model, batches, temperature=config.temperature)]
        mine: Found = {}
        for batch, values in zip(batches, per_batch, strict=True):
            for index, weight, value in zip(batch.index_N.tolist(), batch.weights_N.tolist(), values, strict=True):
                if weight:
                    mine[index] = value
        yield {index: value for found in state.gather_from_data_parallel(mine) for index, value in found.items()}


def _entry(model: Model, data: Dataset, index: int, value: Any) -> dict[str, Any]:
    if model.head == "value":
        entry = {"score": value}
        manifest = model.source.manifest
        if "reward_mean" in manifest:
            entry["normalized"] = (value - manifest["reward_mean"]) / manifest["reward_std"]
        return entry
    _, tokens, mask = data.sample(index)
    return {"tokens": tokens.tolist(), "mask": mask.tolist(), "logprobs": [None, *value.tolist()]}


def _write(file: BinaryIO, model: Model, data: Dataset, found: Found) -> None:
    for index in sorted(found):
        if data.task != "preference":
            line = {"index": index, **_entry(model, data, index, found[index])}
        elif index % 2 == 0:
            pair = {name: _entry(model, data, index + i, found[index + i]) for i, name in enumerate(("chosen", "rejected"))}
            line = {"index": index // 2, **pair}
        else:
            continue
        file.write(msgspec.json.encode(line) + b"\n")


def main(config: ScoreStage) -> None:
    source, data = check(config, state.world_size())
    state.initialize(config.parallel, seed=1)
    model = Model(source, config.parallel, head=source.head, dtype=config.dtype, seed=1)
    plan = make_batch_plan(
        state.groups(), packing=config.packing, micro_batch_size=config.micro_batch_size, padding_side=config.padding_side
    )
    loader = Loader(data, plan)
    output = Path(config.output)
    temporary = output.with_name(output.name + ".tmp")
    if state.is_main():
        print(f"device: {device.current().describe()}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for found in _slices(config, model, loader):
                _write(file, model, data, found)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
        print(f"{data.num_samples:,} samples -> {output}", flush=True)
    else:
        for _ in _slices(config, model, loader):
            continue
    state.shutdown()
