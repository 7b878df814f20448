"""PPO and its critic-free relatives: actor, critic, reference and reward models on Megatron, vLLM on the same ranks or
on separate ones.

A step (docs/rl.md defines every number):
    generate -> score -> log-probs -> values -> advantages -> update critic -> update actor -> reshard
Legend: B answers of a rollout, A tokens of the longest answer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint.source import ModelSource, restore_randomness
from mrlhf.config.options import PPOStage
from mrlhf.data.blend import Dataset
from mrlhf.data.tokenizers.hf import load_tokenizer, stop_ids
from mrlhf.errors import RewardError, ToolError
from mrlhf.memory.estimate import update_activations
from mrlhf.observe.directory import DirectoryLock
from mrlhf.parallel import device, reshard, state
from mrlhf.parallel.split import Bridge, split_world
from mrlhf.rl import advantages as adv
from mrlhf.rl.health import Health
from mrlhf.rl.kl import AdaptiveKL, FixedKL, kl_estimate
from mrlhf.rl.offload import Offload
from mrlhf.rl.ppo_checks import check_ppo, open_ptx
from mrlhf.rl.ppo_models import PPOModels
from mrlhf.rl.rewards.sources import Rewards
from mrlhf.rl.rollout.prompts import Prompts
from mrlhf.rl.rollout.remote import RemoteSampler, run_generator, start_generators, stop_generators
from mrlhf.rl.rollout.sampler import Sampler
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.rollout.vllm_engine import Sampling
from mrlhf.rl.rollout_metrics import Tables, answers_as_text, rollout_metrics
from mrlhf.rl.shaping import RunningStd, informative_groups, overlong_penalty, scale_scores, settle_groups
from mrlhf.rl.updates import Pretraining, actor_loss, critic_loss, policy_count
from mrlhf.training.preflight import RunInputs
from mrlhf.training.resume import open_directory
from mrlhf.training.run import Run
from mrlhf.training.stopping import Interrupted
from mrlhf.training.trainer import LossFn, Trainer

log = logging.getLogger(__name__)
Metrics = dict[str, float]
PENDING_ANSWERS = "ahead.bin"  # in a checkpoint: answers to the next rollout's prompts that no step has used
PHASES = ("gen", "reward", "logprobs", "values", "adv", "update_critic", "update_actor", "reshard")  # timed
FIRST_UPDATE = ("ratio_max_dev", "ratio_mean_dev", "ratio_far")  # a rollout's first update, not the mean of all
CRITIC_METRICS = ("vf_loss", "vf_clipfrac", "grad_norm", "lr", "moe_aux_loss", "moe_z_loss")


def main(config: PPOStage) -> int:
    began = time.monotonic()
    inputs = check_ppo(config, state.world_size())
    lock = open_directory(config)
    bridge = make_bridge(config)
    if bridge is not None and not bridge.trains:
        run_generator(config, inputs, bridge, began=began)
        return 0
    run = PPO(config, inputs, bridge, began=began, lock=lock)
    for step in run.steps():
        before = run.sampling_state()
        try:
            metrics, samples = run.step(step)
        except (Interrupted, RewardError, ToolError) as error:
            # only the rollout was in progress: the resumed run draws it again from its seeds
            run.restore_sampling_state(before)
            run.stop_after(step - 1)
            if isinstance(error, Interrupted):
                continue
            run.saver.finish()
            raise
        run.log_step(step, metrics, samples)
        if run.due_evaluation(step):
            run.evaluate(step)
        if run.due_save(step):
            run.save(step)
    return run.close()


def make_bridge(config: PPOStage) -> Bridge | None:
    """The first call of a run. With separate generating ranks: starts torch.distributed and connects both sides. Else
    None."""
    if config.train.deterministic:
        device.make_deterministic()
    if config.rollout.num_ranks is None:
        return None
    parallel = config.parallel
    return split_world(config.rollout.num_ranks, timeout_minutes=parallel.timeout_minutes,
                       silence_s=parallel.silence_seconds)


class PPO(Run):
    """A run with its models, sampler and rewards. `step` does one rollout and its updates."""

    config: PPOStage

    def __init__(self, config: PPOStage, inputs: RunInputs, bridge: Bridge | None, *, began: float,
                 lock: DirectoryLock | None = None) -> None:
        """bridge: the connection to separate generating ranks, if there are any."""
        layout = state.initialize(config.parallel, seed=config.train.seed)
        self.prompts, self.bridge = Prompts(config, inputs.train), bridge
        store = None if bridge is None else bridge.store
        super().__init__(config, inputs, layout, total_steps=self.prompts.total_steps, began=began, lock=lock,
                         store=store)
        if self.finished:
            return
        if bridge is not None:
            start_generators(bridge)
        with self.phase("build"):
            self._build()
        with self.phase("offload"):
            self.offload.park_all()
        with self.phase("build"):
            self.sampler = self._start_vllm()
        tp, ranks = config.rollout.tensor_parallel_size, config.rollout.num_ranks
        where = "" if ranks is None else f" on {ranks} separate ranks"
        replicas = (ranks or layout.world) // tp
        log.info(f"vLLM: {replicas} replica(s) of tensor parallel {tp}{where}; {self.sampler.memory}")
        for line in reshard.traffic_summary(self.sampler.bytes_of_ranks()):
            log.info(line)
        if self.resumed is not None:
            with self.phase("build"):
                self._resume(self.resumed)
            log.info(f"resumed from {self.resumed.path}")
        if isinstance(self.sampler, Sampler):
            self.sampler.engine.should_stop = self.stopper.requested
        with self.phase("reshard"):
            self.sync_weights()

    def _build(self) -> None:
        config, inputs, rollout, seed = self.config, self.inputs, self.config.rollout, self.config.train.seed
        self.estimator = config.ppo.estimator_row
        self.updates_per_rollout = config.updates_per_rollout
        self.models = PPOModels(config, inputs, updates=self.total_steps * self.updates_per_rollout)
        kl = config.kl
        self.kl = FixedKL(kl.coef) if kl.target is None else AdaptiveKL(kl.coef, target=kl.target, horizon=kl.horizon)
        self.running_std = RunningStd()
        self.ptx: Pretraining | None = None
        if config.ptx.coef > 0:
            self.ptx = Pretraining(config, open_ptx(config, inputs.source)[0], state.groups())
        self.tokenizer = load_tokenizer(inputs.source.hf_dir)
        common: dict[str, Any] = {"parallel": config.parallel, "dtype": config.model.dtype, "seed": seed}
        environment = rollout.environment is not None
        self.rewards = Rewards(config.reward, inputs.source, self.tokenizer, environment=environment,
                               log_dir=self.output_dir / "logs", **common)
        reference = {} if self.models.reference is None else {"reference": self.models.reference}
        frozen = self.rewards.models | reference
        self.offload = Offload(config.offload, trainers=self.models.trainers(), frozen=frozen, memory=self.phase.memory)
        stop = tuple(sorted({*stop_ids(inputs.source.hf_dir, self.tokenizer), *rollout.stop_token_ids}))
        self.sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, stop,
                                 rollout.stop)

    def _start_vllm(self) -> Sampler | RemoteSampler:
        config, inputs, layout, bridge = self.config, self.inputs, self.layout, self.bridge
        critic = None if self.models.critic is None else self.models.critic.spec
        activations = update_activations(config, inputs.source.spec, inputs.train, world=layout.world, critic=critic)
        start = partial(self.offload.start_vllm, sleeps=bridge is not None or config.rollout.sleep,
                        update=activations.total)
        if bridge is not None:
            return start(lambda _: RemoteSampler(config, inputs, layout, bridge))
        return start(lambda to_come: Sampler(config, inputs, self.tokenizer, layout, to_come=to_come))

    @cached_property
    def health(self) -> Health:
        return Health(self.config)

    # ------------------------------------------------------------------ one step

    def step(self, step: int) -> tuple[Metrics, list[dict[str, Any]]]:
        """One rollout and its updates. Returns the metrics, and a few samples for the log."""
        models = self.models
        rollout, scores_B, metrics = self.collect(step)
        scores_B = self.shape_scores(rollout, scores_B)
        with self.phase("logprobs", step), self.offload.using("reference"):
            old_BA, entropy_BA = models.logprobs(models.actor, rollout, with_entropy=True)
            ref_BA = None if models.reference is None else models.logprobs(models.reference, rollout)[0]
        with self.phase("values", step), self.offload.using():
            values_BA = None if models.critic is None else models.values(models.critic, rollout)
        with self.phase("adv", step):
            tables, advantages_BA = self.advantages(rollout, scores_B, old_BA, entropy_BA, ref_BA, values_BA)
        if models.critic is not None:
            with self.phase("update_critic", step), self.offload.using("critic"):
                metrics |= self.update_critic(step, models.critic, rollout, tables)
        if step > self.config.ppo.critic_warmup_steps:
            with self.phase("update_actor", step), self.offload.using("actor"):
                metrics |= self.update_actor(step, rollout, tables, advantages_BA)
        else:
            models.actor.scheduler.step(increment=self.updates_per_rollout)
        with self.phase("reshard", step):
            metrics |= self.sync_weights()
        samples = answers_as_text(rollout, tables, self.tokenizer.decode, most=self.config.rollout.samples_to_log)
        return self.step_metrics(step, rollout, tables, metrics), samples

    def collect(self, step: int) -> tuple[Rollout, torch.Tensor, Metrics]:
        """Answers to `rollout.batch_size` prompts, their scores [B], and the mean of each reward source.

        `rollout.dynamic_sampling` (DAPO, section 3.2) drops groups of equal scores and draws new prompts in their
        place, at most `rollout.max_refills` times. It keeps every group of the last refill.
        """
        config, reward, n = self.config.rollout, self.config.reward, self.config.rollout.n
        clip = reward.clip if reward.scaling == "none" else math.inf  # with a scaling it applies to the scaled scores
        informative = partial(informative_groups, group_size=n, tolerance=reward.equal_tolerance, clip=clip)
        metrics: Metrics = {}
        kept, scores_B, drawn, stale, seconds = Rollout([], [], []), torch.zeros(0), 0, 0.0, 0.0
        for refills_left in range(config.max_refills if config.dynamic_sampling else 0, -1, -1):
            missing = config.batch_size - kept.size // n
            with self.phase("gen", step), self.offload.generating(self.sync_weights):
                prompts = self.prompts.draw(missing)
                rollout = self.generate(self.inputs.train, prompts, step=step, n=n, sampling=self.sampling, first=drawn)
            if not refills_left:
                self.request_rollout(step + 1)
            with self.phase("reward", step), self.offload.using(*self.rewards.models):
                new_B, parts = self.score(rollout)
            for name, value in parts.items():
                metrics[name] = (metrics.get(name, 0.0) * drawn + value * missing) / (drawn + missing)
            drawn += missing
            rows = list(range(rollout.size))
            if refills_left:
                differ_B = informative(new_B).repeat_interleave(n)
                rows = [b for b in rows if differ_B[b]]
            kept, scores_B = kept + rollout.take(rows), torch.cat([scores_B, new_B[rows]])
            if facts := self.sampler.generation_metrics():
                stale += len(rows) * facts["rollout/staleness"]
                seconds += facts["timing_s/generators"]
            if kept.size == config.batch_size * n:
                break
        if config.dynamic_sampling:
            metrics["rollout/prompts_drawn"] = float(drawn)
            metrics["rollout/groups_dropped"] = float(drawn - config.batch_size)
            metrics["rollout/groups_equal"] = float((~informative(scores_B)).sum())
            self.request_rollout(step + 1)
        if seconds:
            metrics |= {"rollout/staleness": stale / kept.size, "timing_s/generators": seconds}
        return kept, scores_B, metrics

    def generate(self, data: Dataset, rows: list[int], *, step: int, n: int, sampling: Sampling,
                 first: int = 0) -> Rollout:
        """`n` answers to each prompt of `rows`. first: the number of the first prompt within rollout `step`."""
        return self.sampler.generate(*_prompts_and_labels(data, rows), n=n, sampling=sampling, step=step, first=first)

    def request_rollout(self, step: int) -> None:
        """Lets separate generating ranks start rollout `step` now. Its prompts count as drawn when the step uses it."""
        rollout = self.config.rollout
        if rollout.max_staleness and step <= self.total_steps:
            prompts, labels = _prompts_and_labels(self.inputs.train, self.prompts.peek(rollout.batch_size))
            self.sampler.request_rollout(prompts, labels, n=rollout.n, sampling=self.sampling, step=step)

    def score(self, rollout: Rollout) -> tuple[torch.Tensor, Metrics]:
        """The score of every answer [B], and the mean of each reward source."""
        rows = self.models.plan.with_fillers(range(rollout.size))
        return self.rewards.score(rollout, self.models.batches(self.models.actor, rollout, rows))

    def shape_scores(self, rollout: Rollout, scores_B: torch.Tensor) -> torch.Tensor:
        """Scores [B] plus the overlong penalty, then scaled. `compute_advantages` clips them."""
        reward, limit = self.config.reward, self.config.rollout.max_new_tokens
        if reward.overlong_buffer:
            buffer, factor = reward.overlong_buffer, reward.overlong_penalty
            scores_B = scores_B + overlong_penalty(rollout.lengths_B(), limit=limit, buffer=buffer, factor=factor)
        if reward.scaling != "none" and self.config.rollout.n > 1:
            scores_B = settle_groups(scores_B, group_size=self.config.rollout.n, tolerance=reward.equal_tolerance)
        return scale_scores(scores_B, scaling=reward.scaling, running=self.running_std)

    def advantages(self, rollout: Rollout, scores_B: torch.Tensor, old_BA: torch.Tensor, entropy_BA: torch.Tensor,
                   ref_BA: torch.Tensor | None, values_BA: torch.Tensor | None) -> tuple[Tables, torch.Tensor]:
        """All tables of the rollout, and the advantages [B, A] for the policy loss (whitened if configured)."""
        config, ppo, mask_BA = self.config, self.config.ppo, rollout.mask_BA()
        kl_BA = torch.zeros_like(old_BA)
        if ref_BA is not None:
            kl_BA = kl_estimate(old_BA, ref_BA, kind=config.kl.kind) * mask_BA
        raw_BA, returns_BA, rewards_BA = adv.compute_advantages(
            scores_B, kl_BA, values_BA, mask_BA, estimator=ppo.estimator, group_size=config.rollout.n,
            beta=0.0 if config.kl.in_loss else self.kl.value, clip=config.reward.clip, gamma=ppo.gamma, lam=ppo.lam,
            tolerance=config.reward.equal_tolerance
        )
        rollout_BA = rollout.rollout_logps_BA()
        tables = Tables(scores_B, mask_BA, rollout_BA, old_BA, entropy_BA, ref_BA, values_BA, rewards_BA, raw_BA,
                        returns_BA)
        whiten = ppo.whiten_advantages and self.estimator.whitens
        return tables, adv.whiten(raw_BA, mask_BA) if whiten else raw_BA

    def update_critic(self, step: int, critic: Trainer, rollout: Rollout, tables: Tables) -> Metrics:
        assert tables.values_BA is not None
        loss = critic_loss(self.config, old_values_BA=tables.values_BA, returns_BA=tables.returns_BA)
        metrics = self.update(critic, rollout, loss, step=step)
        return {f"critic/{name}": metrics[name] for name in CRITIC_METRICS if name in metrics}

    def update_actor(self, step: int, rollout: Rollout, tables: Tables, advantages_BA: torch.Tensor) -> Metrics:
        loss = actor_loss(self.models.actor, self.config, beta=self.kl.value, old_BA=tables.old_BA,
                          ref_BA=tables.ref_BA, advantages_BA=advantages_BA, rollout_BA=tables.rollout_BA)
        metrics = self.update(self.models.actor, rollout, loss, step=step, ptx=self.ptx)
        return {f"actor/{name}": value for name, value in metrics.items() if name != "loss"}

    def update(self, trainer: Trainer, rollout: Rollout, loss: LossFn, *, step: int,
               ptx: Pretraining | None = None) -> Metrics:
        """`ppo.epochs` passes over shuffled mini-batches. Returns the metrics' means over the updates.

        ratio_max_dev, ratio_mean_dev and ratio_far are the first update's. Raises NotFinite as
        `Health.first_ratio`.
        """
        size = self.config.train.global_batch_size
        updates: list[Metrics] = []
        for epoch in range(self.config.ppo.epochs):
            generator = torch.Generator().manual_seed((self.config.train.seed * 1_000_003 + step) * 101 + epoch)
            order = torch.randperm(rollout.size, generator=generator).tolist()
            for start in range(0, rollout.size, size):
                rows = order[start : start + size]
                batches, mixed = self.models.batches(trainer, rollout, rows), loss
                if ptx is not None:
                    more = ptx.batches((step - 1) * self.updates_per_rollout + len(updates) + 1)
                    count = policy_count(rollout, rows, self.config.loss.aggregation)
                    batches, mixed = batches + more, ptx.mixed(loss, trainer, more, policy_count=count)
                updates.append(trainer.step(batches, mixed))
                if len(updates) == 1 and "ratio_max_dev" in updates[0]:
                    self.health.first_ratio(step, updates[0], tokens=int(rollout.lengths_B()[rows].sum()))
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        return means | {name: updates[0][name] for name in FIRST_UPDATE if name in means}

    def sync_weights(self) -> Metrics:
        """Sends the actor's weights to vLLM. Collective."""
        received, seconds = self.offload.write_weights(self.models.actor.parameters())
        worst = torch.tensor([received, seconds], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return {"reshard/bytes": float(worst[0]), "reshard/seconds": float(worst[1])}

    # ------------------------------------------------------------------ metrics and evaluation

    def step_metrics(self, step: int, rollout: Rollout, tables: Tables, metrics: Metrics) -> Metrics:
        """All metrics of a step. Adapts the KL coefficient after recording it."""
        phases = self.phase.metrics(PHASES)
        gen_seconds = metrics.get("timing_s/generators", phases["timing_s/gen"])
        metrics |= rollout_metrics(rollout, tables, self.config, beta=self.kl.value, gen_seconds=gen_seconds)
        metrics |= phases
        self.health.rollout(step, tables.scores_B, metrics)
        self.kl.update(float(tables.kl_B().mean()), rollout.size)
        return metrics

    def log_step(self, step: int, metrics: Metrics, samples: list[dict[str, Any]]) -> None:
        assert self.tracker is not None
        self.log_metrics(step, metrics | self.prompts.metrics())
        self.tracker.samples(step, samples)

    def evaluate(self, step: int) -> None:
        """Logs mean score and length of greedy answers to every prompt of the evaluation set."""
        assert self.inputs.eval is not None
        greedy, rows = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=-1), range(self.inputs.eval.num_samples)
        # a stop request ends the evaluation only: the step is complete, the loop saves it and ends
        with contextlib.suppress(Interrupted), self.phase("evaluate", step):
            with self.offload.generating(self.sync_weights):
                rollout = self.generate(self.inputs.eval, list(rows), step=0, n=1, sampling=greedy)
            with self.offload.using(*self.rewards.models):
                scores_B, _ = self.score(rollout)
            length = float(rollout.lengths_B().float().mean())
            self.log_evaluation(step, {"eval/score/mean": float(scores_B.mean()), "eval/response_length/mean": length})

    # ------------------------------------------------------------------ checkpoints

    def sampling_state(self) -> tuple[int, dict[str, Any]]:
        """The state that a rollout changes before its first update."""
        return self.prompts.drawn, self.running_std.state_dict()

    def restore_sampling_state(self, before: tuple[int, dict[str, Any]]) -> None:
        self.prompts.drawn = before[0]
        self.running_std.load_state_dict(before[1])

    def save(self, step: int) -> None:
        # The seed of answer i to prompt p of rollout s is (train.seed, s, p, i): the manifest needs no further state.
        with self.phase("save", step), self.offload.using("actor", "critic"):
            content = {
                "kl": self.kl.state_dict(),
                "scheduler": self.models.actor.scheduler.num_steps,
                "sampling": {"seed": self.config.train.seed, "next_rollout": step + 1},
                "running_std": self.running_std.state_dict(),
                **self.prompts.state(),
            }
            ahead = self.sampler.pending_answers()
            files = None if ahead is None else {PENDING_ANSWERS: ahead}
            parts = self.models.parts(with_optimizer=self.with_optimizer(step))
            self.write_checkpoint(step, parts, content, files=files)

    def _resume(self, source: ModelSource) -> None:
        """Continues after the checkpoint's step; answers that it holds for the next rollout are not drawn again."""
        manifest, where = source.manifest, str(source.path)
        updates = manifest["step"] * self.updates_per_rollout
        with self.offload.using("actor", "critic"):
            self.models.resume(source.path, updates_done=updates, scheduler=manifest["scheduler"])
        hf_dir, allowed = self.inputs.source.hf_dir, self.config.train.allow_changes
        self.prompts.restore(manifest, where=where, hf_dir=hf_dir, allowed=allowed)
        self.kl.load_state_dict(manifest["kl"])
        if self.config.reward.scaling == "running_std":
            self.running_std.load_state_dict(manifest["running_std"])
        restore_randomness(source)
        ahead, rollout = source.path / PENDING_ANSWERS, self.config.rollout
        if ahead.is_file() and isinstance(self.sampler, RemoteSampler) and rollout.max_staleness:
            prompts, labels = _prompts_and_labels(self.inputs.train, self.prompts.peek(rollout.batch_size))
            self.sampler.restore_pending(ahead.read_bytes(), prompts, labels, n=rollout.n, sampling=self.sampling,
                                         step=manifest["step"] + 1)

    def close_parts(self) -> None:
        if not self.finished:
            self.rewards.close()
            self.sampler.shutdown()
        elif self.bridge is not None:
            stop_generators(self.bridge)


def _prompts_and_labels(data: Dataset, rows: list[int]) -> tuple[list[list[int]], list[Any]]:
    """Token ids and label of the prompts in `rows`."""
    return [data.sample(i)[1].tolist() for i in rows], [data.label(i) for i in rows]
