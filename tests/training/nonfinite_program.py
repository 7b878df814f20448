"""Under torchrun with 2 ranks: a loss or a gradient that is not finite on one of them, under both policies;
prints JSON.

usage: nonfinite_program.py HF_DIR DATA_PREFIX
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def main() -> None:
    import torch
    import torch.distributed as dist
    from groups import leave_layout

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig, ParallelConfig
    from mrlhf.data.batching import BatchPlan
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.loader import Loader
    from mrlhf.observe import log
    from mrlhf.parallel import state
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import MAX_SKIPPED, Trainer

    log.set_up()
    found: dict[str, Any] = {}
    layouts = {
        "dp2": ParallelConfig(),
        "tp2": ParallelConfig(tensor_model_parallel_size=2),
        "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    }
    for name, parallel in layouts.items():
        layout = state.initialize(parallel, seed=1)
        rank = dist.get_rank()
        _, dp, _ = layout.coordinates(rank)
        loader = Loader(
            PackedDataset.open(sys.argv[2]), BatchPlan(packing=False, micro_batch_size=2, dp_rank=dp, dp_size=layout.dp)
        )
        optim = OptimConfig(lr=1e-3, adam_beta2=0.999)
        batches = loader.micro_batches(list(range(4, 12)))

        def make(policy: str, parallel: ParallelConfig = parallel, optim: OptimConfig = optim) -> Any:
            return Trainer(
                open_source(sys.argv[1]),
                parallel,
                optim,
                head="lm",
                dtype="float32",
                seed=1,
                total_steps=50,
                on_nonfinite=policy,
            )

        def everything(trainer: Any) -> list[torch.Tensor]:
            """Parameters and both moments of this rank."""
            moments = [
                x for p in trainer.optimizer.chained_optimizers for s in p.optimizer.state.values() for x in s.values()
            ]
            return [x.clone() for x in [*trainer.parameters().values(), *moments] if isinstance(x, torch.Tensor)]

        def agreed(flag: bool) -> bool:
            return dist.get_world_size() == sum(state.from_all_ranks([int(flag)]))

        def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
            return agreed(len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)))

        trainer = make("skip")
        good = language_model_loss(trainer, aggregation="token")

        def bad_loss(output: Any, batch: Any) -> Any:
            """On the last rank, for the micro-batch with sample 7."""
            total, count, partials = good(output, batch)  # noqa: B023
            return total * (math.nan if 7 in batch.index_N.tolist() else 1.0), count, partials

        def bad_gradient(output: Any, batch: Any) -> Any:
            if rank == dist.get_world_size() - 1:  # noqa: B023
                output.register_hook(lambda grad: grad * math.inf)
            return good(output, batch)  # noqa: B023

        first = trainer.step(batches, good)
        before = everything(trainer)
        skipped = trainer.step(batches, bad_loss)
        untouched = same(before, everything(trainer))
        also_skipped = trainer.step(batches, bad_gradient)
        untouched_by_gradient = same(before, everything(trainer))
        after = trainer.step(batches, good)

        def spike(output: Any, batch: Any) -> Any:
            total, count, partials = good(output, batch)  # noqa: B023
            return total * (100 if 7 in batch.index_N.tolist() else 1), count, partials

        trainer.step(batches, spike)
        losses = trainer.micro_batch_losses()
        result: dict[str, Any] = {
            "skipped": [s["skipped"] for s in (first, skipped, also_skipped, after)],
            "untouched": [untouched, untouched_by_gradient],
            "moved": not same(before, everything(trainer)),
            "goes on": after["loss"] < first["loss"],
            "loss": str(skipped["loss"]),
            "worst": losses[0][1],
            "micro-batches": sorted(i for _, samples in losses for i in samples),
            "worst agreed": len(set(state.from_all_ranks([repr(losses)]))) == 1,
        }
        for _ in range(MAX_SKIPPED - 1):
            trainer.step(batches, bad_loss)
        trainer_2 = make("stop")
        good = language_model_loss(trainer_2, aggregation="token")
        before = everything(trainer_2)
        for what, one, loss in (
            ("limit", trainer, bad_loss),
            ("stop", trainer_2, bad_loss),
            ("stop gradient", trainer_2, bad_gradient),
        ):
            try:
                one.step(batches, loss)
                result[what] = None
            except FloatingPointError as error:
                result[what] = str(error)
            result[what + " agreed"] = agreed(result[what] is not None)
        result["untouched"].append(same(before, everything(trainer_2)))
        found[name] = result
        leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
