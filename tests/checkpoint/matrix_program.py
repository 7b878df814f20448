"""Resumes each layout's checkpoint under each layout; prints JSON. Alone, then under torchrun with 4 ranks, then alone.

usage: matrix_program.py MOE_HF DATA_PREFIX WORK_DIR

A writer takes two steps, saves, and takes two more. A reader takes these two from each writer's checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2, EP2, EP4 = ({f"{name}_model_parallel_size": n} for name, n in (("pipeline", 2), ("expert", 2), ("expert", 4)))
ALONE = "1 process"
# name: parallel sizes, use_distributed_optimizer
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "DP4": ({}, True),
    "DP4, off": ({}, False),
    "EP2": (EP2, True),
    "EP2, off": (EP2, False),
    "EP4": (EP4, True),
    "TP2 EP2": (TP2 | EP2, True),
    "TP2 EP4, off": (TP2 | EP4, False),
    "PP2 EP2, off": (PP2 | EP2, False),
    "TP2 PP2": (TP2 | PP2, True),
}


def read_all(trainer: Any, work: Path, prefix: str) -> dict[str, Any]:
    """The steps of one reader from each checkpoint that there is."""
    from checkpoint_program import steps

    from mrlhf.config.options import OptimConfig
    from mrlhf.training.optimizer import make_scheduler

    results = {}
    for checkpoint in sorted(work.iterdir()):
        optim = OptimConfig(lr=1e-3, lr_decay_style="linear", weight_decay=0.01)
        trainer.scheduler = make_scheduler(trainer.optimizer, optim, total_steps=6)
        trainer.resume(checkpoint, 2, 2)
        results[checkpoint.name] = steps(trainer, prefix, 2)
    return results


def main() -> None:
    hf, prefix, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    import torch.distributed as dist
    from checkpoint_program import make, save, steps
    from groups import leave_layout

    from mrlhf.config.options import ParallelConfig
    from mrlhf.parallel import state

    alone = state.world_size() == 1
    layouts = {ALONE: ({}, True)} if alone else LAYOUTS
    first = not work.exists()
    result: dict[str, Any] = {}
    for is_writer in (True, False) if not alone else (first,):
        for name, (sizes, distributed) in layouts.items():
            parallel = ParallelConfig(**sizes)
            state.initialize(parallel, seed=1)
            trainer = make(hf, parallel, "float32", distributed=distributed)
            if is_writer:
                steps(trainer, prefix, 2)
                save(trainer, work / name, dtype="float32", step=2, keep_last=None)
                result[name] = {"unbroken": steps(trainer, prefix, 2)}
            else:
                result.setdefault(name, {}).update(read_all(trainer, work, prefix))
            leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
