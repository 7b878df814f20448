"""Supervised fine-tuning with the loop written out. It computes the same numbers as `mrlhf sft`, and does nothing else.

    torchrun --nproc-per-node 2 examples/loops/sft_loop.py --model DIR --data PREFIX --output DIR --tensor-parallel 2

Copy it and change what you like: the loss, the schedule, the log. The stage (`mrlhf sft`) adds resume, evaluation,
background saves, a stop on Ctrl-C and SIGTERM, memory and hang reports around the same parts.
Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.config.process import prepare_environment


def main() -> None:
    args = arguments()
    prepare_environment()  # before torch.distributed and Megatron start

    from mrlhf.checkpoint.save import save
    from mrlhf.checkpoint.source import open_source
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.loader import Loader, MicroBatch
    from mrlhf.data.order import Mix, Order
    from mrlhf.parallel import state
    from mrlhf.training.batches import make_batch_plan
    from mrlhf.training.trainer import Partials, Trainer

    # Ranks: torchrun's world, divided into tensor- and data-parallel groups.
    tp = args.tensor_parallel
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    state.initialize(parallel, seed=args.seed)

    # Data: packs written by tools/preprocess_data.py --task sft, in a new order every epoch.
    data = PackedDataset.open(args.data)
    loader = Loader(data, make_batch_plan(state.groups(), packing=True, micro_batch_size=args.micro_batch_size))
    order = Order(
        Mix.single(loader.num_rows),
        global_batch_size=args.global_batch_size,
        num_epochs=args.epochs,
        max_steps=args.max_steps,
        seed=args.seed,
        shuffle=True,
    )

    # Model: this rank's shard of a HF directory or checkpoint, with optimizer and schedule.
    trainer = Trainer(
        open_source(args.model),
        parallel,
        OptimConfig(lr=args.lr),
        head="lm",
        dtype=args.dtype,
        seed=args.seed,
        total_steps=order.total_steps,
    )

    def loss_fn(hidden_BTH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Partials]:
        """Sum of -log p over the trained tokens, and their number. The step divides once, by the global number."""
        logps_BT = trainer.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT).logps
        return -(logps_BT * batch.mask_BT).sum(), batch.mask_BT.sum(), {}

    for step in range(1, order.total_steps + 1):
        metrics = trainer.step(loader.micro_batches(order.rows(step)), loss_fn)
        if state.is_main():
            print(json.dumps({"step": step, **metrics}), flush=True)

    content: dict[str, Any] = {"stage": "sft", "step": order.total_steps, "dtype": args.dtype}
    save(Path(args.output) / f"step_{order.total_steps}", [trainer.part(with_optimizer=False)], content)
    state.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HF directory or mrlhf checkpoint")
    parser.add_argument("--data", required=True, help="prefix written by tools/preprocess_data.py --task sft")
    parser.add_argument("--output", required=True, help="directory for the checkpoint")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=8, help="packs an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="packs a forward pass")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
