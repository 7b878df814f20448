"""Rehearses steps, an evaluation and log-probs of two ranks of each layout, and prints their messages and host waits.

usage: MRLHF_DEVICE=rehearsal wires_program.py OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cuda.wires_spec import CASES, DETERMINISTIC, WORLD, make_spec
from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.parallel import state
from mrlhf.parallel.rehearsal import Rehearsal, unpaired
from mrlhf.sft import language_model_loss
from mrlhf.training.trainer import Trainer

# isort: split
from megatron.core.transformer.moe import moe_utils

vars(moe_utils).setdefault("te_general_gemm", None)


def micro_batches(*, packing: bool) -> list[MicroBatch]:
    """Four, each of another length."""
    rng = np.random.default_rng(0)
    lengths = ((40, 24), (64, 8), (100, 20), (16, 64))
    rows = [[Sample(rng.integers(3, 300, n), np.ones(n, np.uint8), i) for i, n in enumerate(some)] for some in lengths]
    return [collate(some, packing=packing, pad_multiple=8) for some in rows]


class Operations(TorchDispatchMode):
    """The names of all operations on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def logps(trainer: Trainer, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    return trainer.logprobs(hidden, batch).logps[None]


def rehearse(name: str) -> dict[str, object]:
    how, ranks, moe = CASES[name]
    parallel, reports, operations = ParallelConfig(**how), [], Operations()
    torch.use_deterministic_algorithms(name in DETERMINISTIC)
    for rank in ranks:
        with Rehearsal(rank=rank, world=WORLD) as rehearsal:
            state.initialize(parallel, seed=1)
            source = ModelSource(Path("."), Path("."), make_spec(moe), "lm", {})
            with rehearsal.tracing("build"):
                trainer = Trainer(source, parallel, OptimConfig(), head="lm", dtype="bfloat16", seed=1, total_steps=9,
                                  random_init=True)  # fmt: skip
            loss = language_model_loss(trainer, aggregation="token")
            for phase in ("first", "step"):
                with rehearsal.tracing(phase), operations:
                    trainer.step(micro_batches(packing=True), loss)
            with rehearsal.tracing("padded"):
                trainer.step(micro_batches(packing=False), loss)
            with rehearsal.tracing("evaluate"):
                trainer.evaluate(micro_batches(packing=True), loss)
            with rehearsal.tracing("logprobs"):
                batches = micro_batches(packing=False)
                trainer.forward(batches, partial(logps, trainer), channels=1)
            reports.append(rehearsal.report())
    return {
        "unpaired": unpaired(reports),
        "operations": sorted(operations.names),
        "messages": [[vars(m) for m in report.messages] for report in reports],
        "waits": [{f"{phase} {place}": n for (phase, place), n in r.host_waits.items()} for r in reports],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: rehearse(name) for name in sys.argv[2:] or CASES}))
