"""Under torchrun, or alone: a few training steps of every case, one after another;
rank 0 prints losses and norms as JSON.

usage: parity_program.py WORLD_DIR STEPS CASE ...
A case is NAME:KEY=VALUE,... with parallel.* keys (without the prefix)
and stage, model, packing, side, micro, budget, lr, dtype, neftune, blend=1 (the set twice, as two sources with loss
weights that are no integers).
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch.distributed as dist
    from groups import leave_layout

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import (
        DataConfig,
        DPOConfig,
        DPOStage,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        TrainConfig,
    )
    from mrlhf.data.batching import BatchPlan
    from mrlhf.data.blend import Blend, Dataset
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.loader import Loader
    from mrlhf.dpo import preference_loss, reference_logps
    from mrlhf.parallel import state
    from mrlhf.rm import reward_loss
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import Trainer

    world, steps, results = Path(sys.argv[1]), int(sys.argv[2]), {}

    def run(options: dict[str, str]) -> list[dict[str, float]]:
        stage, dtype, kind = options.pop("stage", "sft"), options.pop("dtype", "float32"), options.pop("model", "qwen2")
        packing, side, micro = (
            options.pop("packing", "1") == "1",
            options.pop("side", "right"),
            int(options.pop("micro", 1)),
        )
        budget = int(options.pop("budget", 0)) or None
        blended = options.pop("blend", "0") == "1"
        lr, alpha = float(options.pop("lr", 1e-3)), float(options.pop("neftune", 0))
        parallel = ParallelConfig(
            **{k: v == "true" if v in ("true", "false") else int(v) if v.isdigit() else v for k, v in options.items()}
        )
        layout = state.initialize(parallel, seed=1)
        _, dp, _ = layout.coordinates(dist.get_rank())
        prefix = str(world / {"sft": "sft_few", "pretrain": "text_few"}.get(stage, "pref_few"))
        data: Dataset = PackedDataset.open(prefix)
        if blended:
            data = Blend([data, data], loss_weights=[0.3, 0.07])
        loader = Loader(
            data,
            BatchPlan(
                packing=packing,
                micro_batch_size=micro,
                dp_rank=dp,
                dp_size=layout.dp,
                pad_multiple=state.pad_multiple(parallel),
                padding_side=side,
                micro_batch_multiple=state.slice_multiple(parallel),
                max_tokens=budget,
            ),
        )
        trainer = Trainer(
            open_source(str(world / kind)),
            parallel,
            OptimConfig(lr=lr, lr_decay_style="constant", clip_grad=0.5, adam_beta2=0.999),
            head="value" if stage == "rm" else "lm",
            dtype=dtype,
            seed=1,
            total_steps=steps,
            neftune_alpha=alpha,
        )
        if stage in ("sft", "pretrain"):
            loss = language_model_loss(trainer, aggregation="token")
        elif stage == "rm":
            loss = reward_loss(trainer, loader, kind="sigmoid")
        else:
            config = DPOStage(
                model=ModelConfig(kind),
                data=DataConfig(prefix),
                train=TrainConfig("", 1),
                dpo=DPOConfig(beta=0.5, nll_coef=0.1),
            )
            loss = preference_loss(config, trainer, loader, reference_logps(trainer, loader))
        # the whole set every step, whatever a row is: packed and unpacked see the same samples
        batches = [b for rows in loader.in_order() for b in loader.micro_batches(rows)]
        done = [trainer.step(batches, loss) for _ in range(steps)]
        # ranks that share parameters hold the same ones, also where the next forward pass would have gathered them
        mine = {name: float(p.double().sum()) for name, p in trainer.parameters().items() if ".experts." not in name}
        group = trainer.collection.dp_cp
        shares: list[Any] = [None] * group.size()
        dist.all_gather_object(shares, mine, group=group)
        assert all(share == mine for share in shares)
        return done

    for case in sys.argv[3:]:
        name, _, options = case.partition(":")
        results[name] = run(dict(o.split("=") for o in options.split(",") if o))
        leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
