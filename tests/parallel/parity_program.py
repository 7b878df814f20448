"""Under torchrun: a few SFT steps at one layout; rank 0 prints the losses and gradient norms as JSON.

usage: parity_program.py HF_DIR DATA_PREFIX STEPS KEY=VALUE ...   (parallel.* keys without the prefix; stage, packing, side, micro, lr, dtype)
"""

import json
import sys


def main() -> None:
    from mrlhf.checkpoint import open_source
    from mrlhf.config import DataConfig, DPOConfig, DPOStage, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.loader import Loader
    from mrlhf.dpo import preference_loss, reference_logps
    from mrlhf.engine import Trainer
    from mrlhf.parallel import state
    from mrlhf.rm import reward_loss
    from mrlhf.sft import language_model_loss

    hf, prefix, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    options = dict(a.split("=") for a in sys.argv[4:])
    stage, dtype = options.pop("stage", "sft"), options.pop("dtype", "float32")
    packing, side, micro = options.pop("packing", "1") == "1", options.pop("side", "right"), int(options.pop("micro", 1))
    lr = float(options.pop("lr", 1e-3))
    parallel = ParallelConfig(**{k: v == "true" if v in ("true", "false") else int(v) for k, v in options.items()})
    layout = state.initialize(parallel, seed=1)
    import torch.distributed as dist

    _, dp, _ = layout.coordinates(dist.get_rank())
    data = PackedDataset.open(prefix)
    loader = Loader(
        data,
        packing=packing,
        micro_batch_size=micro,
        dp_rank=dp,
        dp_size=layout.dp,
        pad_multiple=layout.tp if parallel.sequence_parallel else 1,
        padding_side=side,
    )
    trainer = Trainer(
        open_source(hf),
        parallel,
        OptimConfig(lr=lr, lr_decay_style="constant", clip_grad=0.5, adam_beta2=0.999),
        head="value" if stage == "rm" else "lm",
        dtype=dtype,
        seed=1,
        total_steps=steps,
    )
    if stage == "sft":
        loss = language_model_loss(trainer, aggregation="token")
    elif stage == "rm":
        loss = reward_loss(trainer, loader, kind="sigmoid")
    else:
        config = DPOStage(model=ModelConfig(hf), data=DataConfig(prefix), train=TrainConfig("", 1), dpo=DPOConfig(beta=0.5, nll_coef=0.1))
        reference = reference_logps(trainer, loader, mean=False)
        loss = preference_loss(config, trainer, loader, reference)
    # the whole set every step, whatever a row is: packed and unpacked see the same samples
    batches = [b for rows in loader.in_order() for b in loader.micro_batches(rows)]
    results = [trainer.step(batches, loss) for _ in range(steps)]
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results))
    state.shutdown()


if __name__ == "__main__":
    main()
