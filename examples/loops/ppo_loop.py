"""PPO with the loop written out: generate, score, log-probs, values, advantages, update, reshard.

    torchrun --nproc-per-node 2 examples/loops/ppo_loop.py --actor DIR --critic DIR --prompts PREFIX \
        --reward examples/rewards/length_penalty.py:length_penalty --tensor-parallel 2 --steps 3

Copy it and change what you like: the advantages, the losses, where answers come from. The stage (`mrlhf ppo`) computes
the same numbers, and adds checkpoints, resume, offload, generation in ranks of its own, the other estimators, hang and
memory reports. Legend: B answers of a rollout, A tokens of the longest answer, T tokens of a micro-batch, H hidden
size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from mrlhf.config.options import (
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    PPOStage,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from mrlhf.config.process import prepare_environment

BETA, GAMMA, LAMBDA, CLIP, REWARD_CLIP = 0.05, 1.0, 0.95, 0.2, 10.0


def configuration(args: argparse.Namespace) -> PPOStage:
    """The options that the parts below read; everything else has the stage's defaults."""
    tp, answers = args.tensor_parallel, args.prompts_per_rollout * args.answers_per_prompt
    return PPOStage(
        model=ModelConfig(path=args.actor, dtype=args.dtype),
        data=DataConfig(train=(DataSource(args.prompts),)),
        train=TrainConfig(
            output_dir=args.output,
            global_batch_size=answers // 2,
            micro_batch_size=2,
            max_steps=args.steps,
            seed=args.seed,
        ),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=tp > 1),
        rollout=RolloutConfig(
            batch_size=args.prompts_per_rollout,
            n=args.answers_per_prompt,
            max_new_tokens=args.max_new_tokens,
            tensor_parallel_size=tp,
            kv_cache_mib=args.kv_cache_mib,
        ),
        reward=RewardConfig(sources=(args.reward,)),
        ppo=PPOConfig(critic=args.critic),
    )


def main() -> None:
    args = arguments()
    prepare_environment()  # before torch.distributed, Megatron and vLLM start

    from mrlhf.data.loader import MicroBatch
    from mrlhf.data.tokenizers.hf import load_tokenizer, stop_ids
    from mrlhf.parallel import state
    from mrlhf.rl.advantages import gae, token_rewards, whiten
    from mrlhf.rl.kl import kl_estimate
    from mrlhf.rl.policy_loss import policy_loss, value_loss
    from mrlhf.rl.ppo_checks import check_ppo
    from mrlhf.rl.ppo_models import PPOModels
    from mrlhf.rl.rewards.sources import Rewards
    from mrlhf.rl.rollout.prompts import Prompts
    from mrlhf.rl.rollout.sampler import Sampler
    from mrlhf.rl.rollout.tables import gather_table
    from mrlhf.rl.rollout.vllm_engine import Sampling
    from mrlhf.training.trainer import LossFn, Trainer

    config = configuration(args)
    inputs = check_ppo(config, state.world_size())
    layout = state.initialize(config.parallel, seed=args.seed)
    data, prompts = inputs.train, Prompts(config, inputs.train)
    size, answers = config.train.global_batch_size, config.rollout.batch_size * config.rollout.n

    # actor, critic and frozen reference on Megatron; vLLM in the same ranks
    models = PPOModels(config, inputs, updates=prompts.total_steps * (answers // size))
    actor, critic, reference = models.actor, models.critic, models.reference
    assert critic is not None and reference is not None
    tokenizer = load_tokenizer(inputs.source.hf_dir)
    rewards = Rewards(
        config.reward, inputs.source, tokenizer, parallel=config.parallel, dtype=args.dtype, seed=args.seed
    )
    sampler = Sampler(config, inputs, tokenizer, layout)
    stop = tuple(sorted(stop_ids(inputs.source.hf_dir, tokenizer)))
    sampling = Sampling(1.0, 1.0, -1, args.max_new_tokens, stop, ())
    sampler.write_weights(actor.parameters())

    def update(trainer: Trainer, loss_fn: LossFn, step: int) -> dict[str, float]:
        """One pass over shuffled mini-batches; the means of their metrics."""
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 101)
        order = torch.randperm(rollout.size, generator=generator).tolist()
        starts = range(0, rollout.size, size)
        updates = [trainer.step(models.batches(trainer, rollout, order[i : i + size]), loss_fn) for i in starts]
        return {name: sum(metrics[name] for metrics in updates) / len(updates) for name in updates[0]}

    for step in range(1, prompts.total_steps + 1):
        # generate: n answers to every prompt, from every vLLM replica to all ranks
        rows = prompts.draw(config.rollout.batch_size)
        tokens, labels = [data.sample(i)[1].tolist() for i in rows], [data.label(i) for i in rows]
        rollout = sampler.generate(tokens, labels, n=config.rollout.n, sampling=sampling, step=step)
        sampler.sleep()
        mask_BA = rollout.mask_BA()

        # score
        scores_B, _ = rewards.score(rollout, [])

        # log-probs under actor and reference, and values before each token, by the trainer
        (old_BA,) = models.logprobs(actor, rollout)
        (ref_BA,) = models.logprobs(reference, rollout)
        values_BA = models.values(critic, rollout)

        # advantages: -beta KL on every token, the score on the last one, GAE, whitening
        kl_BA = kl_estimate(old_BA, ref_BA, kind="k1") * mask_BA
        rewards_BA = token_rewards(scores_B, kl_BA, mask_BA, beta=BETA, clip=REWARD_CLIP)
        raw_BA, returns_BA = gae(rewards_BA, values_BA, mask_BA, gamma=GAMMA, lam=LAMBDA)
        advantages_BA = whiten(raw_BA, mask_BA)

        # update: sums over trained tokens, divided once by the number of tokens of the whole mini-batch
        def critic_loss(values_BT1: torch.Tensor, batch: MicroBatch):  # type: ignore[no-untyped-def]
            old_BT, returns_BT = gather_table(batch, values_BA), gather_table(batch, returns_BA)  # noqa: B023
            values_BT, mask_BT = values_BT1.squeeze(-1), batch.mask_BT
            total, metrics = value_loss(values_BT, old_BT, returns_BT, mask_BT, clip=CLIP, denominator=1.0)
            return total, mask_BT.sum(), metrics

        def actor_loss(hidden_BTH: torch.Tensor, batch: MicroBatch):  # type: ignore[no-untyped-def]
            logps_BT = actor.logprobs(hidden_BTH, batch, keep_BT=batch.mask_BT).logps
            old_BT, advantages_BT = gather_table(batch, old_BA), gather_table(batch, advantages_BA)  # noqa: B023
            total, metrics = policy_loss(
                logps_BT, old_BT, advantages_BT, batch.mask_BT, clip_low=CLIP, clip_high=CLIP, denominator=1.0
            )
            return total, batch.mask_BT.sum(), metrics

        critic_metrics = update(critic, critic_loss, step)
        actor_metrics = update(actor, actor_loss, step)

        # reshard: the new actor into vLLM, slice by slice
        sampler.write_weights(actor.parameters())
        if state.is_main():
            line = {"step": step, "score": float(scores_B.mean()), "kl": float((kl_BA.sum(1)).mean())}
            line |= {f"critic/{k}": v for k, v in critic_metrics.items()} | {
                f"actor/{k}": v for k, v in actor_metrics.items()
            }
            print(json.dumps(line), flush=True)

    rewards.close()
    sampler.shutdown()
    state.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., object] = parser.add_argument
    add("--actor", required=True, help="language model: HF directory or mrlhf checkpoint; also the reference")
    add("--critic", required=True, help="where the critic starts: a reward model")
    add("--prompts", required=True, help="prefix written by tools/preprocess_data.py --task prompts")
    add("--reward", required=True, help="file.py:function, or http(s)://host")
    add("--output", default="runs/ppo_loop", help="directory for vLLM's logs")
    add("--tensor-parallel", type=int, default=1, help="of the trainer and of vLLM")
    add("--prompts-per-rollout", type=int, default=8)
    add("--answers-per-prompt", type=int, default=2)
    add("--max-new-tokens", type=int, default=64)
    add("--kv-cache-mib", type=int, default=256, help="vLLM's cache on each rank")
    add("--steps", type=int, help="rollouts; default: one pass over the prompts")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
