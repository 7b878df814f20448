"""Rehearses optimizer steps of models with every kind of attention; writes host waits and square tensors as JSON.

usage: MRLHF_DEVICE=rehearsal attention_program.py ZOO_DIR OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from cuda.attention_cases import CASES, LAYOUTS, ROW
from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.models.families import spec_from_hf
from mrlhf.models.layers import attention
from mrlhf.models.layers.router_losses import Balance
from mrlhf.parallel import state
from mrlhf.parallel.rehearsal import Rehearsal
from mrlhf.sft import language_model_loss
from mrlhf.training.trainer import Trainer

attention.BLOCK = 64  # far from the length of a row


def micro_batch(layout: str) -> MicroBatch:
    rng = np.random.default_rng(0)
    lengths = (ROW, ROW - 80)
    samples = [Sample(rng.integers(3, 300, n), np.ones(n, np.uint8), i) for i, n in enumerate(lengths)]
    side = "left" if layout == "left" else "right"
    return collate(samples, packing=layout == "packed", pad_multiple=8, padding_side=side)


def rehearse(kind: str, dtype: str, parallel: ParallelConfig) -> dict[str, object]:
    config = json.loads((Path(sys.argv[1]) / kind / "config.json").read_text())
    spec = spec_from_hf(config, where=kind)
    with Rehearsal(world=4, square=ROW) as rehearsal:
        state.initialize(parallel, seed=1)
        with rehearsal.tracing("build"):
            source = ModelSource(Path("."), Path("."), spec, "lm", {})
            trainer = Trainer(source, parallel, OptimConfig(), head="lm", dtype=dtype, seed=1, total_steps=10,
                              random_init=True, balance=Balance(0.01, 0.001) if spec.experts else None)  # fmt: skip
        if (balance := trainer.balance) is not None:  # compares a count that does not exist here
            real = balance.finish_step
            balance.finish_step = lambda count: real(balance._count)
        for layout in LAYOUTS:
            with rehearsal.tracing(layout):
                trainer.step([micro_batch(layout)], language_model_loss(trainer, aggregation="token"))
        report = rehearsal.report()
    waits = {layout: report.waits(layout) for layout in LAYOUTS}
    return {"waits": waits, "squares": {str(key): n for key, n in report.squares.items()}}


def main() -> None:
    outcomes = {name: rehearse(kind, dtype, ParallelConfig(**how)) for name, (kind, dtype, how) in CASES.items()}
    Path(sys.argv[2]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
