"""Under torchrun, or alone: a few training steps of models of the zoo under every layout of this world;
rank 0 prints JSON.

usage: training_program.py ZOO_DIR LAYOUT=KIND,KIND ...

A layout: see below; the rest of the ranks is data-parallel. KIND+balance: with the routers' auxiliary losses, and
padded instead of packed under dp2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch.distributed as dist
    from groups import leave_layout
    from zoo import BALANCE, LR, STEPS, samples

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig, ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.models.layers.router_losses import Balance
    from mrlhf.parallel import state
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import Trainer

    zoo = Path(sys.argv[1])
    layouts = {
        "1": ParallelConfig(),
        "tp2": ParallelConfig(tensor_model_parallel_size=2),
        "tp2+sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "dp2": ParallelConfig(),
        "cp2": ParallelConfig(context_parallel_size=2, recompute="full"),
        "pp2": ParallelConfig(pipeline_model_parallel_size=2),
        "ep2": ParallelConfig(expert_model_parallel_size=2),
        "tp2xep2": ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True),
        "ep4": ParallelConfig(expert_model_parallel_size=4),
        "tp2xcp2": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True),
        "tp2xpp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
        "overlap": ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
    }
    rows = [Sample(ids.numpy(), ids.numpy() * 0 + 1, i) for i, ids in enumerate(samples())]
    results: dict[str, dict[str, object]] = {}
    for argument in sys.argv[2:]:
        name, kinds = argument.split("=")
        layout = state.initialize(layouts[name], seed=1)
        _, dp, _ = layout.coordinates(dist.get_rank())
        mine = rows[dp :: layout.dp]
        multiple = state.pad_multiple(layouts[name])
        batches = [
            collate(mine[i : i + 2], packing=name != "dp2", pad_multiple=multiple) for i in range(0, len(mine), 2)
        ]
        results[name] = {}
        for kind in kinds.split(","):
            trainer = Trainer(
                open_source(str(zoo / kind.removesuffix("+balance"))),
                layouts[name],
                OptimConfig(lr=LR, lr_decay_style="constant", clip_grad=0.5, adam_beta2=0.999, weight_decay=0.0),
                head="lm",
                dtype="float32",
                seed=1,
                total_steps=STEPS,
                balance=Balance(*BALANCE) if kind.endswith("+balance") else None,
            )
            loss = language_model_loss(trainer, aggregation="token")
            results[name][kind] = [trainer.step(batches, loss) for _ in range(STEPS)]
        leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
