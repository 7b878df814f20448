"""`mrlhf score`: scores a data set under a checkpoint: log-probs of every token, or the value head's scores.

Writes one line a sample (a pair for preference data) in data order, the same for any layout, packed or padded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split

from mrlhf.checkpoint.manifest import replacing
from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import ScoreStage
from mrlhf.data.blend import Dataset
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.errors import CheckpointError, ConfigError, Problems
from mrlhf.models.families.spec import check_layout
from mrlhf.observe.directory import file_problems
from mrlhf.parallel import device, state
from mrlhf.training.batches import make_batch_plan
from mrlhf.training.preflight import open_data
from mrlhf.training.trainer import Model, score_micro_batches

Results = dict[int, Any]  # sample index -> float32 log-probs [T - 1], or a score
log = logging.getLogger(__name__)


def check_score(config: ScoreStage, world: int) -> tuple[ModelSource, Dataset]:
    """Opens the model and the data. Raises every problem, together."""
    problems, source = Problems(), None
    try:
        source = open_source(config.checkpoint)
        problems.extend(check_layout(config.parallel, source.spec, world, trained=False))
    except CheckpointError as error:
        where = f"checkpoint: {error.where or config.checkpoint}"
        problems.add(CheckpointError(error.what, where=where, expected=error.expected, fix=error.fix))
    if config.temperature <= 0:
        what = f"temperature = {config.temperature} has no log-probs"
        problems.add(ConfigError(what, where="temperature", expected="above 0"))
    if config.padding_side == "left":
        if config.packing:
            what = "padding_side = left needs packing false"
            problems.add(ConfigError(what, where="padding_side", fix="--packing false"))
        if source is not None and source.head == "lm":
            what = "padding_side = left is for value heads; this checkpoint is an LM"
            problems.add(ConfigError(what, where="padding_side", expected="right"))
    data, data_problems = open_data(config.data, key="data", task=None, source=source, seq_length=None)
    problems.extend(data_problems)
    problems.extend(file_problems(config.output, key="output"))
    problems.raise_if_any()
    assert source is not None and data is not None
    return source, data


def token_logprobs(model: Model, batches: list[MicroBatch], *, temperature: float) -> list[list[torch.Tensor]]:
    """For each micro-batch, a list with log p of tokens 1 .. T-1 of each sample, [T - 1]. Collective."""

    def per_token(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return model.logprobs(hidden_BTH, batch, temperature=temperature).logps[None]

    outputs = model.forward(batches, per_token, channels=1)
    pairs = zip(batches, outputs, strict=True)
    return [[logps_T[:-1] for logps_T in batch.per_sample(logps_1BT[0].cpu())] for batch, logps_1BT in pairs]


def _score_slices(config: ScoreStage, model: Model, loader: Loader) -> Iterator[Results]:
    """Yields the results of all data-parallel ranks for each slice of the data, on rank 0 (else empty). Collective."""
    for rows in loader.in_order():
        batches = loader.micro_batches(rows)
        if model.head == "value":
            per_batch: list[list[Any]] = [scores_N.tolist() for scores_N in score_micro_batches(model, batches)]
        else:
            logps = token_logprobs(model, batches, temperature=config.temperature)
            per_batch = [[logps_T.numpy() for logps_T in samples] for samples in logps]
        own_results: Results = {}
        for batch, values in zip(batches, per_batch, strict=True):
            for index, weight, value in zip(batch.index_N.tolist(), batch.weights_N.tolist(), values, strict=True):
                if weight:
                    own_results[index] = value
        all_results = state.gather_from_data_parallel(own_results)
        yield {index: value for results in all_results for index, value in results.items()}


def _entry(model: Model, data: Dataset, index: int, value: Any) -> dict[str, Any]:
    if model.head == "value":
        entry = {"score": value}
        manifest = model.source.manifest
        if "reward_mean" in manifest:
            entry["normalized"] = (value - manifest["reward_mean"]) / manifest["reward_std"]
        return entry
    _, tokens, mask = data.sample(index)
    return {"tokens": tokens.tolist(), "mask": mask.tolist(), "logprobs": [None, *value.tolist()]}


def _write_results(file: BinaryIO, model: Model, data: Dataset, results: Results) -> None:
    for index in sorted(results):
        if data.task != "preference":
            line = {"index": index, **_entry(model, data, index, results[index])}
        elif index % 2 == 0:
            chosen, rejected = (_entry(model, data, i, results[i]) for i in (index, index + 1))
            line = {"index": index // 2, "chosen": chosen, "rejected": rejected}
        else:
            continue
        file.write(msgspec.json.encode(line) + b"\n")


def main(config: ScoreStage) -> None:
    source, data = check_score(config, state.world_size())
    state.initialize(config.parallel, seed=1)
    model = Model(source, config.parallel, head=source.head, dtype=config.dtype or source.dtype, seed=1)
    plan = make_batch_plan(state.groups(), packing=config.packing, micro_batch_size=config.micro_batch_size,
                           padding_side=config.padding_side)
    loader = Loader(data, plan)
    output = Path(config.output)
    if state.is_main():
        log.info(f"device: {device.current().summary()}; {model.dtype}")
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as file:
            for results in _score_slices(config, model, loader):
                _write_results(file, model, data, results)
        log.info(f"{data.num_samples:,} samples -> {output}")
    else:
        for _ in _score_slices(config, model, loader):
            continue
    state.shutdown()
