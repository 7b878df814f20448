"""Rehearses a step of every case of memory_cases.py; prints a JSON object: label -> [measured peak, estimate]."""

from __future__ import annotations

import json

from conftest import load_benchmark

from cuda.memory_cases import CASES, MODELS, Case
from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.models.families import spec_from_hf

benchmark = load_benchmark("rehearse")


def rehearse(case: Case) -> list[int]:
    layers = "n_layer" if case.model == "gpt2" else "num_hidden_layers"
    config = {**(MODELS | benchmark.MODELS)[case.model], **case.changes, layers: case.layers}
    in_pipeline = case.parallel.get("pipeline_model_parallel_size", 1) > 1
    options = {"lengths": (1024,) * 4, "micro_batches": 4 if in_pipeline else 1, **case.options}
    done = benchmark.rehearse(
        spec_from_hf(config, where=case.label), ParallelConfig(**case.parallel), world=case.world, rank=case.rank,
        optim=OptimConfig(use_distributed_optimizer=case.distributed), **options,
    )  # fmt: skip
    return [done.peak, done.estimate]


if __name__ == "__main__":
    print("RESULT " + json.dumps({case.label: rehearse(case) for case in CASES}))
