"""Bytes that autograd keeps of one forward pass with its loss, beside the estimate of mrlhf/memory/activations.py.

Alone or on 2 ranks (TP 2 with sequence parallelism). Prints JSON.

usage: activations_program.py ZOO_DIR KIND,KIND ...

Every storage counts once, parameters not. Each kind in fp32 and bf16, packed and padded, under every recomputation.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any


class Held:
    """Lives as long as the graph that has it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def kept_bytes(run: Callable[[], Any], parameters: Any) -> int:
    """Bytes that the graph holds after the pass; graphs that Megatron drops in recomputed layers do not count."""
    import torch

    own, held = {p.untyped_storage().data_ptr() for p in parameters}, weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Held:
        found = Held(tensor)
        held.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        out = run()
    storages = {h.tensor.untyped_storage().data_ptr(): h.tensor.untyped_storage().nbytes() for h in held}
    assert out is not None
    return sum(size for address, size in storages.items() if address not in own)


def main() -> None:
    import numpy as np

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.memory.activations import MicroBatchShape, stage_activations
    from mrlhf.models import gpt
    from mrlhf.parallel import state
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import Model

    draw = np.random.default_rng(0)
    two = os.environ.get("WORLD_SIZE") == "2"
    base = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True) if two else ParallelConfig()
    state.initialize(base, seed=1)
    found = []
    for kind in sys.argv[2].split(","):
        for dtype in ("float32", "bfloat16"):
            for recompute in ("none", "selective", "full"):
                parallel = replace(base, recompute=recompute)
                model = Model(open_source(f"{sys.argv[1]}/{kind}"), parallel, head="lm", dtype=dtype, seed=1)
                model._set_training(True)
                loss = language_model_loss(model, aggregation="token")
                for count, length, packing in ((2, 64, True), (3, 64, False), (1, 192, True)):
                    lengths = [length - 4, length + 4] if (count, packing) == (2, True) else [length] * count
                    samples = [Sample(draw.integers(1, 300, n), np.ones(n, int), i) for i, n in enumerate(lengths)]
                    batch = collate(samples, packing=packing)
                    rows = MicroBatchShape(count * length, max(lengths), 1 if packing else count, packing)
                    forward = lambda: loss(gpt.forward(model.chunks[0], batch), batch)  # noqa: B023, E731
                    measured = kept_bytes(forward, model.modules[0].parameters())
                    formula = stage_activations(model.spec, parallel, rows, dtype=dtype, cuda=False)[0][1].kept
                    found.append((kind, dtype, recompute, count, length, packing, measured, formula))
    if state.is_main():
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
