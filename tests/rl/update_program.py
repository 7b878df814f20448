"""Under torchrun (or alone): one update of the actor on a fixed rollout, with several micro-batch sizes,
packed and padded.

usage: update_program.py WORLD OUTPUT.pt

Adam's epsilon is so large that a step is proportional to the gradient.
OUTPUT: {case: [flat change of the parameters, metrics]}.
"""

import sys
from pathlib import Path

CASES = {
    "token": {},
    "sequence": {"loss.aggregation": "sequence", "ppo.ratio": "sequence", "kl.in_loss": "true", "kl.kind": "k3"},
    "ptx": {"ptx.coef": 0.5, "ppo.entropy_coef": 0.02, "rollout.correction": "tis"},
}
WAYS = [(1, True), (4, True), (2, False), (8, False)]  # micro-batch size, packing


def main() -> None:
    import torch
    import torch.distributed as dist

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.load import load_config
    from mrlhf.config.options import PPOStage
    from mrlhf.parallel import state
    from mrlhf.rl.ppo import PPO
    from mrlhf.rl.ppo_checks import open_ptx
    from mrlhf.rl.ppo_models import PPOModels
    from mrlhf.rl.rollout.tables import Rollout
    from mrlhf.rl.rollout.vllm_engine import Answer
    from mrlhf.rl.updates import Pretraining, actor_loss
    from mrlhf.training.batches import training_batch_plan
    from mrlhf.training.trainer import Trainer

    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 300, (n,), generator=generator).tolist()

    prompts, answers = [], []
    for b in range(16):
        length, seen = 3 + 2 * b % 13, (b % 3) * 2  # every third answer has no observation
        prompts.append(ids(2 + b % 5))
        answers.append(Answer(ids(length + seen), [-1.0] * length, True, ((1, 1 + seen),) if seen else ()))
    rollout = Rollout(prompts, answers, [None] * 16)
    mask_BA = rollout.mask_BA()
    shape = mask_BA.shape
    noise = [torch.randn(*shape, generator=generator) * mask_BA for _ in range(4)]
    found = {}
    layout = None
    for case, changes in CASES.items():
        for micro, packing in WAYS:
            values = {
                "model.path": world / "qwen2",
                "model.dtype": "float32",
                "data.train": world / "prompts",
                "data.packing": str(packing).lower(),
                "train.output_dir": out.parent / "none",
                "train.global_batch_size": 16,
                "train.micro_batch_size": micro,
                "optim.adam_eps": 1e3,
                "optim.lr": 1e3,
                "optim.lr_decay_style": "constant",
                "optim.clip_grad": 0,
                "rollout.batch_size": 16,
                "reward.sources": "examples/rewards/length_penalty.py:length_penalty",
                "ptx.data": world / "sft",
                "ptx.batch_size": 4,
                "ptx.micro_batch_size": 2,
                **changes,
            }
            config = load_config(
                PPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)]
            )
            layout = layout or state.initialize(config.parallel, seed=1)
            source = open_source(config.model.path)
            trainer = Trainer(source, config.parallel, config.optim, head="lm", dtype="float32", seed=1, total_steps=1)
            ppo = object.__new__(PPO)  # its updates alone: no vLLM, no other models
            ppo.models = object.__new__(PPOModels)
            ppo.config, ppo.models.config, ppo.updates_per_rollout = config, config, 1
            ppo.models.plan, ppo.models.critic = training_batch_plan(config, trainer.groups), None
            old_BA = ppo.models.logprobs(trainer, rollout)[0]
            loss = actor_loss(
                trainer,
                config,
                beta=0.3,
                old_BA=old_BA,
                ref_BA=old_BA + 0.3 * noise[0],
                advantages_BA=noise[1],
                rollout_BA=old_BA + 0.5 * noise[2],
            )
            ptx = Pretraining(config, open_ptx(config, source)[0], state.groups()) if config.ptx.coef else None
            before = torch.cat([p.flatten().clone() for p in trainer.parameters().values()])
            log = ppo.update(trainer, rollout, loss, step=1, ptx=ptx)
            after = torch.cat([p.flatten() for p in trainer.parameters().values()])
            found[case, micro, packing] = (after - before, log)
    try:  # the old log-probs of another position, on the last trainer: every rank must end
        wrong = actor_loss(trainer, config, beta=0.3, old_BA=old_BA.roll(1, 1), ref_BA=None, advantages_BA=noise[1],
                           rollout_BA=old_BA)  # fmt: skip
        ppo.update(trainer, rollout, wrong, step=2)
    except FloatingPointError as error:
        found["fault"] = str(error)
    if dist.get_rank() == 0:
        torch.save(found, out)
    state.shutdown()


if __name__ == "__main__":
    main()
