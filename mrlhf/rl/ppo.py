"""PPO and its critic-free relatives: actor, critic, reference and reward models on Megatron, vLLM in the same ranks or in others.

The loop (semantics of every number: docs/rl.md):
    generate -> score -> log-probs -> values -> advantages -> update -> reshard
Legend: B answers of a rollout, A tokens of the longest answer, T tokens and N samples of a micro-batch.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint.manager import Saver
from mrlhf.checkpoint.save import Part
from mrlhf.checkpoint.source import ModelSource, restore_randomness, to_resume
from mrlhf.config.options import PPOStage
from mrlhf.data.blend import Dataset
from mrlhf.data.loader import MicroBatch
from mrlhf.data.tokenizers.hf import load_tokenizer, stop_ids
from mrlhf.errors import CheckpointError, ConfigError, DataError, MrlhfError
from mrlhf.memory.tracker import Memory
from mrlhf.models.families.spec import check_layout
from mrlhf.models.layers.router_losses import make_balance, of_aggregation, trained_tokens
from mrlhf.observe import heartbeat
from mrlhf.parallel import device, reshard, state
from mrlhf.parallel.split import Bridge, split
from mrlhf.rl import advantages as adv
from mrlhf.rl.kl import AdaptiveKL, FixedKL, kl_estimate
from mrlhf.rl.phases import Offload, Phases
from mrlhf.rl.rewards.sources import Rewards, critic_source
from mrlhf.rl.rollout.environments import check_environment
from mrlhf.rl.rollout.prompts import Prompts
from mrlhf.rl.rollout.remote import RemoteSampler, begin, dismiss, run_generator
from mrlhf.rl.rollout.sampler import Sampler
from mrlhf.rl.rollout.tables import Rollout, micro_batches, table
from mrlhf.rl.rollout.vllm_engine import Sampling, check_rollout
from mrlhf.rl.rollout.vllm_weights import check_weights
from mrlhf.rl.rollout_metrics import Tables, describe, mismatch_warning
from mrlhf.rl.shaping import RunningStd, informative_groups, overlong_penalty, scale_scores
from mrlhf.rl.updates import Pretraining, actor_loss, critic_loss, policy_count
from mrlhf.training import preflight
from mrlhf.training import run as supervised
from mrlhf.training.resume import check_resume, describe_run
from mrlhf.training.stopping import EXIT_STOPPED, Interrupted
from mrlhf.training.trainer import LossFn, Model, Trainer

AHEAD = "ahead.bin"  # in a checkpoint: the next rollout's answers, where they were made meanwhile
# rounding between the forward pass that gave the old log-probs and the training pass, not a change of the policy
_FIRST_RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}


class PPO:
    """Models, engine and schedule of a run; `step` is one rollout and its updates."""

    def __init__(self, config: PPOStage, run: preflight.Run, layout: state.Layout, memory: Memory, bridge: Bridge | None = None) -> None:
        """bridge: to the ranks that generate, where they are others."""
        self.config, self.run, self.layout, self.memory = config, run, layout, memory
        self.rank = dist.get_rank()
        ppo, rollout, seed = config.ppo, config.rollout, config.train.seed
        self.prompts = Prompts(config, run.train)
        self.updates_per_rollout = ppo.epochs * (rollout.batch_size * rollout.n // config.train.global_batch_size)
        updates = self.prompts.total_steps * self.updates_per_rollout
        dtype = config.model.dtype
        common: dict[str, Any] = {"dtype": dtype, "seed": seed, "total_steps": updates}
        balance = make_balance(config.model, of_aggregation(config.loss))
        self.actor = Trainer(run.source, config.parallel, config.optim, head="lm", balance=balance, **common)
        self.critic: Trainer | None = None
        if ppo.estimator == "gae":
            optim = replace(config.optim, lr=ppo.critic_lr, min_lr=min(config.optim.min_lr, ppo.critic_lr))
            source = critic_source(config, run.source)
            balance = make_balance(config.model, trained_tokens) if source.spec.experts is not None else None
            with state.more_groups(config.critic_parallel).in_force():
                self.critic = Trainer(source, config.critic_parallel, optim, head="value", balance=balance, **common)
        self.reference: Model | None = None
        if config.kl.coef > 0:
            self.reference = Model(run.source, config.parallel, head="lm", dtype=dtype, seed=seed)
        self.kl = (
            FixedKL(config.kl.coef)
            if config.kl.target is None
            else AdaptiveKL(config.kl.coef, target=config.kl.target, horizon=config.kl.horizon)
        )
        self.running_std = RunningStd()
        self.ptx: Pretraining | None = None
        if config.ptx.coef > 0:
            self.ptx = Pretraining(config, open_ptx(config, run.source)[0], dp_rank=state.groups().dp_rank, dp_size=layout.dp)
        self.tokenizer = load_tokenizer(run.source.hf_dir)
        self.rewards = Rewards(
            config.reward,
            run.source,
            self.tokenizer,
            parallel=config.parallel,
            dtype=dtype,
            seed=seed,
            environment=rollout.environment is not None,
        )
        trainers = {"actor": self.actor} | ({"critic": self.critic} if self.critic is not None else {})
        frozen = self.rewards.models | ({"reference": self.reference} if self.reference is not None else {})
        self.offload = Offload(config.offload, trainers=trainers, frozen=frozen)
        stop = tuple(sorted({*stop_ids(run.source.hf_dir, self.tokenizer), *rollout.stop_token_ids}))
        self.sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, stop, rollout.stop)
        self.sampler: Sampler | RemoteSampler
        if bridge is None:
            self.sampler = Sampler(config, run, self.tokenizer, layout)
        else:
            self.sampler = RemoteSampler(config, run, layout, bridge)

    # ------------------------------------------------------------------ checkpoints

    def parts(self, *, with_optimizer: bool) -> list[Part]:
        parts = [self.actor.part(with_optimizer=with_optimizer)]
        return parts if self.critic is None else [*parts, self.critic.part("critic", with_optimizer=with_optimizer)]

    def state(self, step: int) -> dict[str, Any]:
        """Of the run after rollout `step`, for the manifest. Answer i to prompt p of rollout s is drawn from the seed (train.seed, s, p, i)."""
        return {
            "kl": self.kl.state_dict(),
            "scheduler": self.actor.scheduler.num_steps,
            "sampling": {"seed": self.config.train.seed, "next_rollout": step + 1},
            "running_std": self.running_std.state_dict(),
            **self.prompts.state(),
        }

    def resume(self, source: ModelSource) -> None:
        """Go on after the rollout of a checkpoint; one that was under way is drawn again from its seeds, or its answers are in the checkpoint."""
        manifest = source.manifest
        done = manifest["step"] * self.updates_per_rollout
        self.actor.resume(source.path, done, manifest["scheduler"])
        if self.critic is not None:
            self.critic.resume(source.path / "critic", done, manifest["scheduler"])
        hf_dir, allowed = self.run.source.hf_dir, self.config.train.allow_changes
        self.prompts.go_on(manifest, where=str(source.path), hf_dir=hf_dir, allowed=allowed)
        self.kl.load_state_dict(manifest["kl"])
        if self.config.reward.scaling == "running_std":
            self.running_std.load_state_dict(manifest["running_std"])
        restore_randomness(source)
        ahead, rollout = source.path / AHEAD, self.config.rollout
        if ahead.is_file() and isinstance(self.sampler, RemoteSampler) and rollout.max_staleness:
            prompts, labels = self.read(self.run.train, self.prompts.peek(rollout.batch_size))
            self.sampler.take_up(ahead.read_bytes(), prompts, labels, n=rollout.n, sampling=self.sampling, step=manifest["step"] + 1)

    # ------------------------------------------------------------------ the phases

    def sync_weights(self) -> dict[str, float]:
        """Actor weights into vLLM."""
        received, seconds = self.sampler.write_weights(self.actor.parameters())
        worst = torch.tensor([received, seconds], dtype=torch.float64, device=device.current().name)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return {"reshard/bytes": float(worst[0]), "reshard/seconds": float(worst[1])}

    def generate(self, data: Any, rows: list[int], *, step: int, n: int, sampling: Sampling, first: int = 0) -> Rollout:
        return self.sampler.generate(*self.read(data, rows), n=n, sampling=sampling, step=step, first=first)

    def read(self, data: Any, rows: list[int]) -> tuple[list[list[int]], list[Any]]:
        """Prompts and labels."""
        return [data.sample(i)[1].tolist() for i in rows], [data.label(i) for i in rows]

    def ask_ahead(self, step: int) -> None:
        """For the answers of rollout `step`, where they are to be made meanwhile; the prompts count as drawn when it comes."""
        rollout = self.config.rollout
        if rollout.max_staleness and step <= self.prompts.total_steps:
            self.sampler.ask(
                *self.read(self.run.train, self.prompts.peek(rollout.batch_size)), n=rollout.n, sampling=self.sampling, step=step
            )

    def batches(self, model: Model, rollout: Rollout, rows: list[int] | range) -> list[MicroBatch]:
        """This rank's share of the rows, as `model` is cut."""
        groups = model.groups
        return micro_batches(
            rollout,
            rows,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.layout.dp,
            packing=self.config.data.packing,
            pad_multiple=state.pad_multiple(groups.parallel),
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            slice_multiple=state.slice_multiple(groups.parallel),
        )

    def logprobs(self, model: Model, rollout: Rollout, *, with_entropy: bool = False) -> list[torch.Tensor]:
        """[B, A] log-probs of the answers under `model` at the rollout's temperature (and the entropies)."""

        def fn(hidden_BTH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
            logps_BT, entropy_BT, *_ = model.logprobs(
                hidden_BTH, batch, temperature=self.config.rollout.temperature, with_entropy=with_entropy, keep_BT=batch.mask_BT
            )
            return torch.stack([logps_BT, entropy_BT]) if with_entropy else logps_BT[None]

        shape = (rollout.size, int(rollout.lengths_B().max()))
        return table(model, self.batches(model, rollout, range(rollout.size)), fn, shape=shape, channels=2 if with_entropy else 1)

    def values(self, rollout: Rollout) -> torch.Tensor:
        """[B, A]: the head at the position before each answer token."""
        assert self.critic is not None
        shape = (rollout.size, int(rollout.lengths_B().max()))
        batches = self.batches(self.critic, rollout, range(rollout.size))
        return table(self.critic, batches, lambda v_BT1, batch: v_BT1.squeeze(-1).float()[None], shape=shape)[0]

    def score(self, rollout: Rollout) -> tuple[torch.Tensor, dict[str, float]]:
        """[B] of every answer, and each source's mean."""
        unit = self.config.train.micro_batch_size * self.layout.dp * state.slice_multiple(self.config.parallel)
        return self.rewards.score(rollout, self.batches(self.actor, rollout, [*range(rollout.size), *[-1] * (-rollout.size % unit)]))

    def collect(self, step: int, timer: Phases) -> tuple[Rollout, torch.Tensor, dict[str, float]]:
        """Answers to `rollout.batch_size` prompts, their scores [B], and the sources' means.

        With `rollout.dynamic_sampling` groups of equal scores are dropped, and as many further prompts drawn as are then missing, at
        most `rollout.max_refills` times: the last refill is taken as it comes.
        """
        config, n = self.config.rollout, self.config.rollout.n
        log: dict[str, float] = {}
        kept, scores_B, drawn, stale, seconds = Rollout([], [], []), torch.zeros(0), 0, 0.0, 0.0
        for left in range(config.max_refills if config.dynamic_sampling else 0, -1, -1):
            missing = config.batch_size - kept.size // n
            with timer("gen"):
                if drawn and self.sampler.sleeps:
                    self.sync_weights()
                rollout = self.generate(self.run.train, self.prompts.draw(missing), step=step, n=n, sampling=self.sampling, first=drawn)
                self.sampler.sleep()
            if not left:
                self.ask_ahead(step + 1)
            with timer("reward"), self.offload.using(*self.rewards.models):
                new_B, parts = self.score(rollout)
            log |= {k: (log.get(k, 0.0) * drawn + v * missing) / (drawn + missing) for k, v in parts.items()}
            drawn += missing
            rows = list(range(rollout.size))
            if left:
                differ_B = informative_groups(new_B, group_size=n).repeat_interleave(n)
                rows = [b for b in rows if differ_B[b]]
            kept, scores_B = kept + rollout.take(rows), torch.cat([scores_B, new_B[rows]])
            if facts := self.sampler.facts():
                stale, seconds = stale + len(rows) * facts["rollout/staleness"], seconds + facts["timing_s/generators"]
            if kept.size == config.batch_size * n:
                break
        if config.dynamic_sampling:
            log |= {"rollout/prompts_drawn": float(drawn), "rollout/groups_dropped": float(drawn - config.batch_size)}
            log["rollout/groups_equal"] = float((~informative_groups(scores_B, group_size=n)).sum())
            self.ask_ahead(step + 1)
        if seconds:
            log |= {"rollout/staleness": stale / kept.size, "timing_s/generators": seconds}
        return kept, scores_B, log

    def shape(self, rollout: Rollout, scores_B: torch.Tensor) -> torch.Tensor:
        """[B]: with the overlong penalty, scaled; still to be clipped."""
        reward, limit = self.config.reward, self.config.rollout.max_new_tokens
        if reward.overlong_buffer:
            lengths_B = rollout.lengths_B()
            scores_B = scores_B + overlong_penalty(lengths_B, limit=limit, buffer=reward.overlong_buffer, factor=reward.overlong_penalty)
        return scale_scores(scores_B, scaling=reward.scaling, running=self.running_std)

    def update(self, trainer: Trainer, rollout: Rollout, loss: LossFn, *, step: int, ptx: Pretraining | None = None) -> dict[str, float]:
        """`ppo.epochs` passes over shuffled mini-batches. Returns the means over the updates, and the first update's largest |ratio - 1|."""
        size = self.config.train.global_batch_size
        found: list[dict[str, float]] = []
        for epoch in range(self.config.ppo.epochs):
            generator = torch.Generator().manual_seed((self.config.train.seed * 1_000_003 + step) * 101 + epoch)
            order = torch.randperm(rollout.size, generator=generator).tolist()
            for at in range(0, rollout.size, size):
                rows = order[at : at + size]
                batches, mixed = self.batches(trainer, rollout, rows), loss
                if ptx is not None:
                    more = ptx.batches((step - 1) * self.updates_per_rollout + len(found) + 1)
                    count = policy_count(rollout, rows, self.config.loss.aggregation)
                    batches, mixed = batches + more, ptx.mixed(loss, trainer, more, policy_count=count)
                found.append(trainer.step(batches, mixed))
            first = found[0].get("ratio_max_dev", 0.0)
            if first > _FIRST_RATIO_TOLERANCE[self.config.model.dtype]:
                raise FloatingPointError(f"the first ratio of a rollout is off 1 by {first}: training and scoring passes disagree")
        means = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
        return means | ({"ratio_max_dev": found[0]["ratio_max_dev"]} if "ratio_max_dev" in means else {})

    # ------------------------------------------------------------------ one step

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One rollout: metrics and a few samples for the log."""
        config, ppo, timer = self.config, self.config.ppo, Phases(step, self.memory)
        with self.memory("offload", step):
            self.offload.park_all()
        rollout, scores_B, log = self.collect(step, timer)
        scores_B = self.shape(rollout, scores_B)
        with timer("logprobs"), self.offload.using("reference"):
            old_BA, entropy_BA = self.logprobs(self.actor, rollout, with_entropy=True)
            ref_BA = self.logprobs(self.reference, rollout)[0] if self.reference is not None else None
        with timer("values"):
            values_BA = self.values(rollout) if self.critic is not None else None
        with timer("adv"):
            mask_BA, rollout_BA = rollout.mask_BA(), rollout.rollout_logps_BA()
            kl_BA = kl_estimate(old_BA, ref_BA, kind=config.kl.kind) * mask_BA if ref_BA is not None else torch.zeros_like(old_BA)
            raw_BA, returns_BA, rewards_BA = adv.estimate(
                scores_B, kl_BA, values_BA, mask_BA, estimator=ppo.estimator, group_size=config.rollout.n,
                beta=0.0 if config.kl.in_loss else self.kl.value, clip=config.reward.clip, gamma=ppo.gamma, lam=ppo.lam,
            )  # fmt: skip
            advantages_BA = adv.whiten(raw_BA, mask_BA) if ppo.whiten_advantages and ppo.estimator in adv.WHITENED else raw_BA
        if self.critic is not None and values_BA is not None:
            with timer("update_critic"), self.offload.using("critic"):
                loss = critic_loss(config, old_values_BA=values_BA, returns_BA=returns_BA)
                found = self.update(self.critic, rollout, loss, step=step)
            log |= {
                f"critic/{k}": found[k] for k in ("vf_loss", "vf_clipfrac", "grad_norm", "lr", "moe_aux_loss", "moe_z_loss") if k in found
            }
        if step > ppo.critic_warmup_steps:
            with timer("update_actor"), self.offload.using("actor"):
                loss = actor_loss(
                    self.actor, config, beta=self.kl.value, old_BA=old_BA, ref_BA=ref_BA, advantages_BA=advantages_BA, rollout_BA=rollout_BA
                )
                found = self.update(self.actor, rollout, loss, step=step, ptx=self.ptx)
            log |= {f"actor/{k}": v for k, v in found.items() if k != "loss"}
        else:
            self.actor.scheduler.step(increment=self.updates_per_rollout)
        with timer("reshard"):
            log |= self.sync_weights()
        tables = Tables(scores_B, mask_BA, rollout_BA, old_BA, entropy_BA, ref_BA, values_BA, rewards_BA, raw_BA, returns_BA)
        gen_seconds = log.get("timing_s/generators", timer.seconds["timing_s/gen"])
        log |= describe(
            rollout, tables, beta=self.kl.value, gen_seconds=gen_seconds, with_environment=config.rollout.environment is not None
        )
        log |= timer.times() | timer.memory()
        corrected = config.rollout.correction != "none"
        warning = mismatch_warning(log, limit=config.rollout.mismatch_warning, corrected=corrected)
        if warning is not None:
            supervised.say(f"step {step}: {warning}")
        kl_B = tables.kl_B()
        self.kl.update(float(kl_B.mean()), rollout.size)
        return log, self.samples(rollout, scores_B, kl_B)

    def evaluate(self, data: Any) -> dict[str, float]:
        """Greedy answers to every prompt of the evaluation set: their score and length."""
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=-1)
        rollout = self.generate(data, list(range(data.num_samples)), step=0, n=1, sampling=greedy)
        with self.offload.using(*self.rewards.models):
            scores_B, _ = self.score(rollout)
        return {"eval/score/mean": float(scores_B.mean()), "eval/response_length/mean": float(rollout.lengths_B().float().mean())}

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


def open_ptx(config: PPOStage, source: ModelSource) -> tuple[Any, list[MrlhfError]]:
    """The data set of ptx.data: made for sft or for pretrain."""
    assert config.ptx.data is not None
    data, found = preflight.open_data(config.ptx.data, key="ptx.data", task=None, source=source, seq_length=None)
    if data is not None and data.task not in ("sft", "pretrain"):
        where = f"ptx.data = {config.ptx.data}"
        found.append(DataError(f"the data was made with --task {data.task}", where=where, expected="--task sft or pretrain"))
    return data, found


def _check_critic(config: PPOStage, actor: ModelSource, world: int) -> list[MrlhfError]:
    """The critic's layout against its model, and one of its own against the batch."""
    parallel = config.critic_parallel
    if config.ppo.estimator != "gae":
        return []
    try:
        spec = critic_source(config, actor).spec
    except CheckpointError:
        return []  # Rewards.check has it

    if parallel == config.parallel:
        return [] if spec == actor.spec else [*check_layout(parallel, spec, world)]

    def own(text: str | None) -> str | None:
        return text and text.replace("parallel.", "ppo.critic_")

    found = [*check_layout(parallel, spec, world), *state.check_batch(config.train, parallel, world)]
    return [ConfigError(f"critic: {own(e.what)}", where=own(e.where), expected=own(e.expected), fix=own(e.fix)) for e in found]


def check(config: PPOStage, world: int) -> preflight.Run:
    """Everything that can be wrong, before anything is built. world: all of torchrun's ranks."""
    generators = config.rollout.num_ranks or 0
    if generators >= world:
        raise ConfigError(
            f"rollout.num_ranks = {generators} of {world} ranks leave none to train",
            where="rollout.num_ranks",
            expected=f"torchrun with {generators + state.Layout.of(config.parallel, 1).smallest} ranks or more",
        )
    world -= generators

    def more(source: ModelSource, sets: list[tuple[str, Dataset]]) -> list[MrlhfError]:
        tp = config.rollout.tensor_parallel_size
        return [
            *check_rollout(source.spec, tp=tp, world=generators or world, key="rollout.tensor_parallel_size"),
            *check_weights(source.spec, config.rollout.weights, dtype=config.model.dtype, placement=config.rollout.placement),
            *preflight.check_prompt_budget(config, source, sets),
            *Rewards.check(config.reward, source, parallel=config.parallel, world=world, critic=config.ppo.critic),
            *_check_critic(config, source, world),
            *(open_ptx(config, source)[1] if config.ptx.coef > 0 else []),
            *(check_environment(config.rollout.environment, load_tokenizer(source.hf_dir), sets[0][1].meta) if sets else []),
        ]

    return preflight.check_run("ppo", config, world=world, more=more)


def make_bridge(config: PPOStage) -> Bridge | None:
    """Starts torch.distributed where generation has ranks of its own."""
    if config.rollout.num_ranks is None:
        return None
    return split(config.rollout.num_ranks, timeout_minutes=config.parallel.timeout_minutes, silence_s=config.parallel.silence_seconds)


def main(config: PPOStage) -> int:
    began = time.monotonic()
    run = check(config, state.world_size())
    output_dir = Path(config.train.output_dir)
    check_resume(config, output_dir)
    bridge = make_bridge(config)
    if bridge is not None and not bridge.trains:
        run_generator(config, run, bridge, began=began)
        return 0
    layout = state.initialize(config.parallel, seed=config.train.seed)
    stopper = supervised.guard(config, began=began, store=None if bridge is None else bridge.store)
    say = supervised.say
    say(f"device: {device.current().describe()}")
    say(layout.describe(config.train))
    total = Prompts(config, run.train).total_steps
    saver = Saver(output_dir, config.checkpoint)
    resumed = to_resume(output_dir, total_steps=total, verify=config.checkpoint.verify)
    done = 0 if resumed is None else int(resumed.manifest["step"])
    if done >= total:
        heartbeat.stop()
        say(f"already finished: {output_dir / 'checkpoints'}")
        if bridge is not None:
            dismiss(bridge)
        state.shutdown()
        return 0
    if bridge is not None:
        begin(bridge)
    memory = Memory(config, spec=run.source.spec, rank=dist.get_rank(), world=layout.world)
    with memory("build"):
        ppo = PPO(config, run, layout, memory, bridge)
    tp, where = config.rollout.tensor_parallel_size, "" if bridge is None else f" on {len(bridge.generators)} ranks of their own"
    say(f"vLLM: {(config.rollout.num_ranks or layout.world) // tp} replica(s) of tensor parallel {tp}{where}; {ppo.sampler.memory}")
    for line in reshard.describe(ppo.sampler.bytes_of_ranks()):
        say(line)
    if resumed is not None:
        with memory("build"):
            ppo.resume(resumed)
        say(f"resumed from {resumed.path}")
    if isinstance(ppo.sampler, Sampler):
        ppo.sampler.engine.should_stop = stopper.requested
    with memory("reshard"):
        ppo.sync_weights()
    tracker = supervised.make_tracker("ppo", config, total_steps=total, done=done)
    described = describe_run("ppo", config, layout, run.source.hf_dir)

    def save(step: int) -> None:
        with memory("save", step):
            ppo.offload.fetch("actor", "critic")
            parts = ppo.parts(with_optimizer=step < total or config.checkpoint.save_optimizer)
            ahead = ppo.sampler.ahead()
            saver.save(step, parts, described | ppo.state(step), last=step == total, files=None if ahead is None else {AHEAD: ahead})

    def leave(text: str, status: int = 0) -> int:
        ppo.rewards.close()
        ppo.sampler.shutdown()
        return supervised.leave(tracker, saver, text, status=status)

    supervised.all_is_built()
    for step in range(done + 1, total + 1):
        start, drawn, std = time.perf_counter(), ppo.prompts.drawn, ppo.running_std.state_dict()
        try:
            with heartbeat.phase("rollout", step):
                log, samples = ppo.step(step)
        except Interrupted:
            ppo.prompts.drawn = drawn
            ppo.running_std.load_state_dict(std)
            if step - 1 not in (done, saver.last_step):
                save(step - 1)
            return leave(stopper.describe(step - 1), EXIT_STOPPED)
        tracker.log(step, log | ppo.prompts.metrics() | saver.waited())
        tracker.samples(step, samples)
        saver.poll()
        last = step == total
        if run.eval is not None and (last or (config.train.eval_interval and step % config.train.eval_interval == 0)):
            with contextlib.suppress(Interrupted), memory("evaluate", step):  # the step itself is done: it is saved below, and the run left
                tracker.log(step, ppo.evaluate(run.eval))
        if last or (config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0):
            save(step)
        if not last and stopper.agreed(next_s=time.perf_counter() - start + saver.seconds):
            if saver.last_step != step:
                save(step)
            return leave(stopper.describe(step), EXIT_STOPPED)
    return leave(f"finished: {output_dir / 'checkpoints'}")
