"""Rehearses steps, an evaluation and log-probs of two ranks of each layout, and prints their messages and host waits.

usage: MRLHF_DEVICE=rehearsal wires_program.py OUTPUT.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from cuda.wires_spec import CASES, DETERMINISTIC, WORLD, make_spec
from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.options import DPOConfig, OptimConfig, ParallelConfig
from mrlhf.data.batching import BatchPlan
from mrlhf.data.loader import Loader, MicroBatch, Sample, collate
from mrlhf.dpo import preference_loss
from mrlhf.parallel import state
from mrlhf.parallel.rehearsal import Rehearsal, unpaired
from mrlhf.sft import language_model_loss
from mrlhf.training.trainer import Trainer

# isort: split


def micro_batches(*, packing: bool) -> list[MicroBatch]:
    """Four, each of another length."""
    rng = np.random.default_rng(0)
    lengths = ((40, 24), (64, 8), (100, 20), (16, 64))
    rows = [[Sample(rng.integers(3, 300, n), np.ones(n, np.uint8), i) for i, n in enumerate(some)] for some in lengths]
    return [collate(some, packing=packing, pad_multiple=8) for some in rows]


DPO = SimpleNamespace(dpo=DPOConfig())


class Operations(TorchDispatchMode):
    """The names of all operations on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def noted(groups: list[list[tuple[bool, int]]]) -> Iterator[None]:
    """Adds what each batch of messages sends (True) and receives, and the other rank."""
    real = dist.batch_isend_irecv

    def start(operations: list[dist.P2POp]) -> list[Any]:
        groups.append([(o.op.__name__ == "isend", o.peer) for o in operations])
        return real(operations)

    dist.batch_isend_irecv = start
    try:
        yield
    finally:
        dist.batch_isend_irecv = real


def logps(trainer: Trainer, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    return trainer.logprobs(hidden, batch).logps[None]


def rehearse(name: str) -> dict[str, object]:
    how, ranks, moe = CASES[name]
    parallel, reports, operations = ParallelConfig(**how), [], Operations()
    torch.use_deterministic_algorithms(name in DETERMINISTIC)
    groups: list[list[list[tuple[bool, int]]]] = []  # of every rank: its groups of messages between two ranks
    for rank in ranks:
        groups.append([])
        with Rehearsal(rank=rank, world=WORLD) as rehearsal, noted(groups[-1]):
            state.initialize(parallel, seed=1)
            source = ModelSource(Path("."), Path("."), make_spec(moe), "lm", {})
            with rehearsal.tracing("build"):
                trainer = Trainer(source, parallel, OptimConfig(), head="lm", dtype="bfloat16", seed=1, total_steps=9,
                                  random_init=True)  # fmt: skip
            loss = language_model_loss(trainer, aggregation="token")
            with rehearsal.tracing("first"), operations:
                trainer.step(micro_batches(packing=True), loss)
            with rehearsal.tracing("step"):
                trainer.step(micro_batches(packing=True), loss)
            with rehearsal.tracing("padded"):
                trainer.step(micro_batches(packing=False), loss)
            with rehearsal.tracing("dpo"):  # a pair in each row
                pairs = Loader(SimpleNamespace(task="preference"), BatchPlan(packing=True))
                trainer.step(micro_batches(packing=True), preference_loss(DPO, trainer, pairs, torch.zeros(2)))
            with rehearsal.tracing("evaluate"):
                trainer.evaluate(micro_batches(packing=True), loss)
            with rehearsal.tracing("logprobs"):
                batches = micro_batches(packing=False)
                trainer.forward(batches, partial(logps, trainer), channels=1)
            reports.append(rehearsal.report())
    return {
        "unpaired": unpaired(reports),
        "groups": groups,
        "operations": sorted(operations.names),
        "messages": [[vars(m) for m in report.messages] for report in reports],
        "waits": [{f"{phase} {place}": n for (phase, place), n in r.host_waits.items()} for r in reports],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: rehearse(name) for name in sys.argv[2:] or CASES}))
