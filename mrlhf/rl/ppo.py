"""PPO and its critic-free relatives: actor, critic, reference and reward models on Megatron, vLLM in the same ranks.

The loop (semantics of every number: docs/ppo.md):
    generate -> score -> log-probs -> values -> advantages -> update -> reshard
Legend: B answers of a rollout, A tokens of the longest answer, T tokens and N samples of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf import checkpoint, preflight, supervised
from mrlhf.checkpoint import ModelSource
from mrlhf.config import PPOStage
from mrlhf.data.blend import Dataset
from mrlhf.data.loader import MicroBatch
from mrlhf.data.order import Order
from mrlhf.engine import DTYPES, Model, Trainer
from mrlhf.errors import MrlhfError
from mrlhf.losses import reduce_loss, sum_and_count
from mrlhf.models.balance import make_balance, of_aggregation, trained_tokens
from mrlhf.models.layouts import make_reshard
from mrlhf.parallel import device, reshard, state, watch
from mrlhf.rl import advantages as adv
from mrlhf.rl.kl import AdaptiveKL, FixedKL, kl_estimate
from mrlhf.rl.phases import Offload, Phases
from mrlhf.rl.policy_loss import policy_loss, value_loss
from mrlhf.rl.reward_sources import Rewards, critic_source
from mrlhf.rl.rollout import Rollout, generate, micro_batches, spread, table
from mrlhf.rl.vllm_engine import Sampling, VLLMEngine, check_rollout
from mrlhf.tokenizer import load, stop_ids

# rounding between the forward pass that gave the old log-probs and the training pass, not a change of the policy
_FIRST_RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}


def make_prompt_order(config: PPOStage, data: Dataset) -> Order:
    """Prompts of rollout 1, 2, ...: whole rollouts only, the last one goes on into a new epoch, no prompt is dropped."""
    train = replace(config.train, global_batch_size=config.rollout.batch_size)
    prompts = replace(config, train=train, data=replace(config.data, packing=False))
    rollouts = supervised.make_order(prompts, data).total_steps
    return supervised.make_order(replace(prompts, train=replace(train, max_steps=rollouts)), data)


class PPO:
    """Models, engine and schedule of a run; `step` is one rollout and its updates."""

    def __init__(self, config: PPOStage, run: preflight.Run, layout: state.Layout) -> None:
        self.config, self.run, self.layout = config, run, layout
        self.rank = dist.get_rank()
        _, self.dp_rank, _ = layout.coordinates(self.rank)
        ppo, rollout, seed = config.ppo, config.rollout, config.train.seed
        self.answers = rollout.batch_size * rollout.n
        self.order = make_prompt_order(config, run.train)
        self.updates_per_rollout = ppo.epochs * (self.answers // config.train.global_batch_size)
        updates = self.order.total_steps * self.updates_per_rollout
        dtype = config.model.dtype
        common: dict[str, Any] = {"dtype": dtype, "seed": seed, "total_steps": updates}
        balance = make_balance(config.model, of_aggregation(config.loss))
        self.actor = Trainer(run.source, config.parallel, config.optim, head="lm", balance=balance, **common)
        self.critic: Trainer | None = None
        if ppo.estimator == "gae":
            optim = replace(config.optim, lr=ppo.critic_lr, min_lr=min(config.optim.min_lr, ppo.critic_lr))
            source = critic_source(config, run.source)
            balance = make_balance(config.model, trained_tokens) if source.spec.experts is not None else None
            self.critic = Trainer(source, config.parallel, optim, head="value", balance=balance, **common)
        self.reference: Model | None = None
        if config.kl.coef > 0:
            self.reference = Model(run.source, config.parallel, head="lm", dtype=dtype, seed=seed)
        self.kl = (
            FixedKL(config.kl.coef)
            if config.kl.target is None
            else AdaptiveKL(config.kl.coef, target=config.kl.target, horizon=config.kl.horizon)
        )
        self.tokenizer = load(run.source.hf_dir)
        self.rewards = Rewards(config, run.source, self.tokenizer)
        trainers = {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})
        frozen = self.rewards.models | ({"reference": self.reference} if self.reference is not None else {})
        self.offload = Offload(config.offload, trainers=trainers, frozen=frozen)
        self.sampling = Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, stop_ids(run.source.hf_dir, self.tokenizer)
        )
        self.engine = VLLMEngine(
            run.source.spec,
            run.source.hf_dir,
            dtype=dtype,
            tp=rollout.tensor_parallel_size,
            max_model_len=run.train.max_length + rollout.max_new_tokens,
            kv_cache_mib=rollout.kv_cache_mib,
            max_num_seqs=rollout.max_num_seqs,
            seed=seed,
            sleep=rollout.sleep,
            log_dir=Path(config.train.output_dir) / "logs",
        )
        self.reshard = make_reshard(
            run.source.spec,
            layout,
            rollout_tp=rollout.tensor_parallel_size,
            rank=self.rank,
            dtype=DTYPES[dtype],
            bucket_bytes=rollout.reshard_bucket_mib << 20,
        )

    # ------------------------------------------------------------------ the phases

    def sync_weights(self) -> dict[str, float]:
        """Actor weights into vLLM."""
        self.engine.wake_weights()
        seconds = self.reshard.exchange(self.actor.parameters(), self.engine.parameters)
        self.engine.wake_cache()
        self.engine.weights_changed()
        worst = torch.tensor([float(self.reshard.received), seconds], dtype=torch.float64, device=device.current().name)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return {"reshard/bytes": float(worst[0]), "reshard/seconds": float(worst[1])}

    def generate(self, data: Any, rows: list[int], *, step: int, n: int, sampling: Sampling) -> Rollout:
        tp = self.config.rollout.tensor_parallel_size
        return generate(
            self.engine,
            [data.sample(i)[1].tolist() for i in rows],
            n=n,
            sampling=sampling,
            seed=self.config.train.seed,
            step=step,
            labels=[data.label(i) for i in rows],
            replicas=self.layout.world // tp,
            replica=self.rank // tp,
        )

    def batches(self, rollout: Rollout, rows: list[int] | range) -> list[MicroBatch]:
        return micro_batches(
            rollout,
            rows,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.layout.dp,
            packing=self.config.data.packing,
            pad_multiple=state.pad_multiple(self.config.parallel),
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            slice_multiple=state.slice_multiple(self.config.parallel),
        )

    def logprobs(self, model: Model, rollout: Rollout, *, with_entropy: bool = False) -> list[torch.Tensor]:
        """[B, A] log-probs of the answers under `model` at the rollout's temperature (and the entropies)."""

        def fn(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
            logps_BT, entropy_BT, *_ = model.logprobs(
                hidden_BTH, batch, temperature=self.config.rollout.temperature, with_entropy=with_entropy, keep_BT=batch.mask_BT
            )
            return torch.stack([logps_BT, entropy_BT]) if with_entropy else logps_BT[None]

        shape = (rollout.size, int(rollout.lengths_B().max()))
        return table(model, self.batches(rollout, range(rollout.size)), fn, shape=shape, channels=2 if with_entropy else 1)

    def values(self, rollout: Rollout) -> torch.Tensor:
        """[B, A]: the head at the position before each answer token."""
        assert self.critic is not None
        shape = (rollout.size, int(rollout.lengths_B().max()))
        return table(
            self.critic, self.batches(rollout, range(rollout.size)), lambda v_BT1, batch: v_BT1.squeeze(-1).float()[None], shape=shape
        )[0]

    def advantages(
        self, scores_B: torch.Tensor, kl_BA: torch.Tensor, values_BA: torch.Tensor | None, mask_BA: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(advantages, returns, token rewards), all [B, A]; sections 5.6 to 5.8 and the estimators without a critic."""
        ppo, clip = self.config.ppo, self.config.reward.clip
        beta = 0.0 if self.config.kl.in_loss else self.kl.value
        if ppo.estimator == "gae":
            assert values_BA is not None
            rewards_BA = adv.token_rewards(scores_B, kl_BA, mask_BA, beta=beta, clip=clip)
            advantages_BA, returns_BA = adv.gae(rewards_BA, values_BA, mask_BA, gamma=ppo.gamma, lam=ppo.lam)
        else:
            shaped_B = adv.group_scores(scores_B.clamp(-clip, clip), estimator=ppo.estimator, group_size=self.config.rollout.n)
            rewards_BA = adv.token_rewards(shaped_B, kl_BA, mask_BA, beta=beta)
            returns_BA = advantages_BA = adv.discounted_returns(rewards_BA, mask_BA, gamma=ppo.gamma)
        return advantages_BA, returns_BA, rewards_BA

    # ------------------------------------------------------------------ losses

    def actor_loss(self, old_BA: torch.Tensor, ref_BA: torch.Tensor | None, advantages_BA: torch.Tensor, rollout_BA: torch.Tensor):
        config, ppo, aggregation = self.config, self.config.ppo, self.config.loss.aggregation
        name = config.rollout.correction
        correction = None if name == "none" else (name, config.rollout.correction_low, config.rollout.correction_high)

        def loss(hidden_BTH: torch.Tensor, batch: MicroBatch):
            logps_BT, entropy_BT, *_ = self.actor.logprobs(
                hidden_BTH, batch, temperature=config.rollout.temperature, with_entropy=True, keep_BT=batch.mask_BT
            )
            pieces = {"segment_ids": batch.segments_BT, "num_segments": batch.num_samples + 1}
            total, partials = policy_loss(
                logps_BT,
                spread(batch, old_BA),
                spread(batch, advantages_BA),
                batch.mask_BT,
                clip_low=ppo.clip_low,
                clip_high=ppo.clip_high,
                dual_clip=ppo.dual_clip,
                ratio=ppo.ratio,
                aggregation=aggregation,
                denominator=1.0,
                rollout_logps=spread(batch, rollout_BA) if correction else None,
                correction=correction,
                **pieces,
            )
            if ppo.entropy_coef:
                total = (
                    total - ppo.entropy_coef * reduce_loss(entropy_BT, batch.mask_BT, aggregation=aggregation, denominator=1.0, **pieces)[0]
                )
            if config.kl.in_loss and ref_BA is not None:
                kl_BT = kl_estimate(logps_BT, spread(batch, ref_BA), kind=config.kl.kind)
                total = total + self.kl.value * reduce_loss(kl_BT, batch.mask_BT, aggregation=aggregation, denominator=1.0, **pieces)[0]
            count = batch.mask_BT.sum() if aggregation == "token" else batch.weights_N.sum()
            return total, count, {**partials, "entropy": sum_and_count(entropy_BT, batch.mask_BT.bool())}

        return loss

    def critic_loss(self, old_values_BA: torch.Tensor, returns_BA: torch.Tensor):
        def loss(values_BT1: torch.Tensor, batch: MicroBatch):
            values_BT = values_BT1.squeeze(-1)
            total, partials = value_loss(
                values_BT,
                spread(batch, old_values_BA),
                spread(batch, returns_BA),
                batch.mask_BT,
                clip=self.config.ppo.value_clip,
                denominator=1.0,
            )
            return total, batch.mask_BT.sum(), partials

        return loss

    def update(self, trainer: Trainer, rollout: Rollout, loss: Any, *, step: int) -> dict[str, float]:
        """`ppo.epochs` passes over shuffled mini-batches. Returns the means over the updates, and the first update's largest |ratio - 1|."""
        size, found = self.config.train.global_batch_size, []
        for epoch in range(self.config.ppo.epochs):
            generator = torch.Generator().manual_seed((self.config.train.seed * 1_000_003 + step) * 101 + epoch)
            order = torch.randperm(rollout.size, generator=generator).tolist()
            found += [trainer.step(self.batches(rollout, order[at : at + size]), loss) for at in range(0, rollout.size, size)]
            first = found[0].get("ratio_max_dev", 0.0)
            if first > _FIRST_RATIO_TOLERANCE[self.config.model.dtype]:
                raise FloatingPointError(f"the first ratio of a rollout is off 1 by {first}: training and scoring passes disagree")
        means = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
        return means | ({"ratio_max_dev": found[0]["ratio_max_dev"]} if "ratio_max_dev" in means else {})

    # ------------------------------------------------------------------ one step

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One rollout: metrics and a few samples for the log."""
        config, timer = self.config, Phases(step)
        self.offload.park_all()
        with timer("gen"):
            rollout = self.generate(self.run.train, self.order.rows(step), step=step, n=config.rollout.n, sampling=self.sampling)
            self.engine.sleep()
        with timer("reward"), self.offload.using(*self.rewards.models):
            scores_B, parts = self.rewards.score(rollout, self.batches(rollout, range(rollout.size)))
        with timer("logprobs"), self.offload.using("reference"):
            old_BA, entropy_BA = self.logprobs(self.actor, rollout, with_entropy=True)
            ref_BA = self.logprobs(self.reference, rollout)[0] if self.reference is not None else None
        with timer("values"):
            values_BA = self.values(rollout) if self.critic is not None else None
        with timer("adv"):
            mask_BA, rollout_BA = rollout.mask_BA(), rollout.rollout_logps_BA()
            kl_BA = kl_estimate(old_BA, ref_BA, kind=config.kl.kind) * mask_BA if ref_BA is not None else torch.zeros_like(old_BA)
            advantages_BA, returns_BA, rewards_BA = self.advantages(scores_B, kl_BA, values_BA, mask_BA)
            raw_BA = advantages_BA
            if config.ppo.whiten_advantages and config.ppo.estimator in ("gae", "reinforce", "reinforce_baseline"):
                advantages_BA = adv.whiten(advantages_BA, mask_BA)
        log: dict[str, float] = {}
        if self.critic is not None and values_BA is not None:
            with timer("update_critic"), self.offload.using("critic"):
                found = self.update(self.critic, rollout, self.critic_loss(values_BA, returns_BA), step=step)
            log |= {f"critic/{k}": found[k] for k in ("vf_loss", "vf_clipfrac", "grad_norm", "lr", "moe_aux_loss", "moe_z_loss") if k in found}
        if step > config.ppo.critic_warmup_steps:
            with timer("update_actor"), self.offload.using("actor"):
                found = self.update(self.actor, rollout, self.actor_loss(old_BA, ref_BA, advantages_BA, rollout_BA), step=step)
            log |= {f"actor/{k}": v for k, v in found.items() if k != "loss"}
        else:
            self.actor.scheduler.step(increment=self.updates_per_rollout)
        with timer("reshard"):
            log |= self.sync_weights()
        seconds = timer.times()
        k1_BA = kl_estimate(old_BA, ref_BA, kind="k1") * mask_BA if ref_BA is not None else torch.zeros_like(old_BA)
        kl_B = k1_BA.sum(-1)
        log |= (
            seconds
            | timer.memory()
            | parts
            | self.describe(rollout, scores_B, rewards_BA, raw_BA, returns_BA, values_BA, kl_B, old_BA, rollout_BA, mask_BA, seconds)
        )
        log["actor/entropy"] = float((entropy_BA * mask_BA).sum() / mask_BA.sum())
        self.kl.update(float(kl_B.mean()), rollout.size)
        return log, self.samples(rollout, scores_B, kl_B)

    def describe(
        self,
        rollout: Rollout,
        scores_B: torch.Tensor,
        rewards_BA: torch.Tensor,
        advantages_BA: torch.Tensor,
        returns_BA: torch.Tensor,
        values_BA: torch.Tensor | None,
        kl_B: torch.Tensor,
        old_BA: torch.Tensor,
        rollout_BA: torch.Tensor,
        mask_BA: torch.Tensor,
        seconds: dict[str, float],
    ) -> dict[str, float]:
        """Means of the rollout; tokens are those of the answers."""

        def mean(x_BA: torch.Tensor) -> float:
            return float((x_BA * mask_BA).sum() / mask_BA.sum())

        lengths_B = rollout.lengths_B().float()
        gap_BA = (old_BA - rollout_BA) * mask_BA
        found = {
            "critic/score/mean": float(scores_B.mean()),
            "critic/rewards/mean": float(rewards_BA.sum(-1).mean()),
            "critic/advantages/mean": mean(advantages_BA),
            "critic/returns/mean": mean(returns_BA),
            "objective/kl": float(kl_B.mean()),
            "kl/coef": self.kl.value,
            "response_length/mean": float(lengths_B.mean()),
            "response_length/max": float(lengths_B.max()),
            "response_length/clip_ratio": sum(not a.stopped for a in rollout.answers) / rollout.size,
            "prompt_length/mean": sum(map(len, rollout.prompts)) / rollout.size,
            "rollout/num_answers": float(rollout.size),
            "rollout/logprob_abs_diff_mean": mean(gap_BA.abs()),
            "rollout/logprob_abs_diff_max": float(gap_BA.abs().max()),
            # KL(vLLM || trainer) from vLLM's samples, by k3
            "rollout/kl_mismatch": mean(torch.expm1(gap_BA) - gap_BA),
            "rollout/tokens_per_s": float(lengths_B.sum()) / seconds["timing_s/gen"],
        }
        if values_BA is not None:
            residual_BA, center = returns_BA - values_BA, mean(returns_BA)
            spread_of_returns = mean((returns_BA - center) ** 2)
            found["critic/values/mean"] = mean(values_BA)
            found["critic/vf_explained_var"] = 1 - mean((residual_BA - mean(residual_BA)) ** 2) / max(spread_of_returns, 1e-8)
        return found

    def evaluate(self, data: Any) -> dict[str, float]:
        """Greedy answers to every prompt of the evaluation set: their score and length."""
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=-1)
        unit = self.config.train.micro_batch_size * self.layout.dp * state.slice_multiple(self.config.parallel)
        rows = list(range(data.num_samples))
        rollout = self.generate(data, rows + [0] * (-len(rows) % unit), step=0, n=1, sampling=greedy)
        with self.offload.using(*self.rewards.models):
            scores_B, _ = self.rewards.score(rollout, self.batches(rollout, range(rollout.size)))
        lengths_B = rollout.lengths_B().float()[: len(rows)]
        return {"eval/score/mean": float(scores_B[: len(rows)].mean()), "eval/response_length/mean": float(lengths_B.mean())}

    def samples(self, rollout: Rollout, scores_B: torch.Tensor, kl_B: torch.Tensor) -> list[dict[str, Any]]:
        found = []
        for b in range(min(self.config.rollout.samples_to_log, rollout.size)):
            answer = rollout.answers[b]
            found.append(
                {
                    "prompt": self.tokenizer.decode(rollout.prompts[b]),
                    "completion": self.tokenizer.decode(answer.tokens),
                    "score": float(scores_B[b]),
                    "kl": float(kl_B[b]),
                    "label": rollout.labels[b],
                    "stopped": answer.stopped,
                }
            )
        return found


def check(config: PPOStage, world: int) -> preflight.Run:
    """Everything that can be wrong, before anything is built."""

    def more(source: ModelSource, sets: list[tuple[str, Dataset]]) -> list[MrlhfError]:
        tp = config.rollout.tensor_parallel_size
        return [
            *check_rollout(source.spec, tp=tp, world=world, key="rollout.tensor_parallel_size"),
            *preflight.check_prompt_budget(config, source, sets),
            *Rewards.check(config, source, world=world),
        ]

    return preflight.check_run("ppo", config, world=world, more=more)


def main(config: PPOStage) -> None:
    run = check(config, state.world_size())
    output_dir = Path(config.train.output_dir)
    supervised.check_resume(config, output_dir)
    layout = state.initialize(config.parallel, seed=config.train.seed)
    watch.log_to(output_dir / "logs")
    say = supervised.say
    say(f"device: {device.current().describe()}")
    say(layout.describe(config.train))
    total = make_prompt_order(config, run.train).total_steps
    resumed = checkpoint.to_resume(output_dir, total_steps=total)
    done = 0 if resumed is None else int(resumed.manifest["step"])
    if done >= total:
        say(f"already finished: {output_dir / 'checkpoints'}")
        return state.shutdown()
    ppo = PPO(config, run, layout)
    replicas = layout.world // config.rollout.tensor_parallel_size
    say(f"vLLM: {replicas} replica(s) of tensor parallel {config.rollout.tensor_parallel_size}; {ppo.engine.memory.describe()}")
    for line in reshard.describe(state.from_all_ranks([(ppo.reshard.sent, ppo.reshard.received, ppo.reshard.copied)])):
        say(line)
    if resumed is not None:
        ppo.actor.resume(resumed.path, done * ppo.updates_per_rollout)
        if ppo.critic is not None:
            ppo.critic.resume(resumed.path / "critic", done * ppo.updates_per_rollout)
        supervised.go_on(ppo.order, run.train, resumed.manifest, where=str(resumed.path))
        ppo.kl.load_state_dict(resumed.manifest["kl"])
        say(f"resumed from {resumed.path}")
    ppo.sync_weights()
    tracker = supervised.make_tracker("ppo", config, total_steps=total, done=done)

    for step in range(done + 1, total + 1):
        log, samples = ppo.step(step)
        log["train/epoch"] = ppo.order.epoch(step)
        tracker.log(step, log | supervised.source_epochs(ppo.order, run.train, step))
        tracker.samples(step, samples)
        last = step == total
        if run.eval is not None and (last or (config.train.eval_interval and step % config.train.eval_interval == 0)):
            tracker.log(step, ppo.evaluate(run.eval))
        if last or (config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0):
            keep = not last or config.checkpoint.save_optimizer
            parts = [ppo.actor.part(with_optimizer=keep)]
            if ppo.critic is not None:
                parts.append(ppo.critic.part("critic", with_optimizer=keep))
            ppo.offload.fetch("actor", "critic")
            checkpoint.save(
                output_dir / "checkpoints" / f"step_{step}",
                parts,
                stage="ppo",
                step=step,
                dtype=config.model.dtype,
                extra={"kl": ppo.kl.state_dict(), **supervised.data_position(ppo.order, run.train, step)},
                keep_last=config.checkpoint.keep_last,
            )
    tracker.close()
    ppo.rewards.close()
    ppo.engine.shutdown()
    say(f"finished: {output_dir / 'checkpoints'}")
    state.shutdown()
