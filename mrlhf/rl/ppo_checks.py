"""Checks a PPO run's configuration, models and data before it builds anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.options import PPOStage
from mrlhf.data.tokenizers.hf import load_tokenizer
from mrlhf.errors import CheckpointError, ConfigError, DataError, MrlhfError
from mrlhf.models.families.spec import check_layout, ranks_fix, rename_keys
from mrlhf.parallel import state
from mrlhf.rl.health import truncation_notes
from mrlhf.rl.rewards.sources import check_reward_sources, critic_source
from mrlhf.rl.rollout.environments import check_environment
from mrlhf.rl.rollout.prompts import make_prompt_order
from mrlhf.rl.rollout.vllm_checks import check_vllm_model
from mrlhf.rl.rollout.vllm_weights import check_weights
from mrlhf.training import preflight

_CRITIC_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")  # the others are the actor's


def open_ptx(config: PPOStage, source: ModelSource) -> tuple[Any, list[MrlhfError]]:
    """Opens the data set of ptx.data, which must be made for sft or pretrain. Returns it, and its problems."""
    assert config.ptx.data is not None
    data, problems = preflight.open_data(config.ptx.data, key="ptx.data", task=None, source=source, seq_length=None)
    if data is not None and data.task not in ("sft", "pretrain"):
        where = f"ptx.data = {config.ptx.data}"
        problems.append(DataError(f"the data was made with --task {data.task}", where=where,
                                  expected="--task sft or pretrain"))
    return data, problems


def _check_critic(config: PPOStage, actor: ModelSource, world: int, *, apart: int) -> list[MrlhfError]:
    """Checks the critic's layout against its model, and a separate layout also against the batch."""
    parallel = config.critic_parallel
    if not config.ppo.estimator_row.needs_critic:
        return []
    try:
        spec = critic_source(config, actor).spec
    except CheckpointError:
        return []  # check_reward_sources reports it

    if parallel == config.parallel:
        return [] if spec == actor.spec else [*check_layout(parallel, spec, world, apart=apart)]
    problems = check_layout(parallel, spec, world, apart=apart)
    problems += state.check_batch(config.train, parallel, world, answers=config.rollout.batch_size * config.rollout.n)
    own = {f"parallel.{name}": f"ppo.critic_{name}" for name in _CRITIC_SIZES}
    return [type(e)(f"critic: {e.what}", where=e.where, expected=e.expected, fix=e.fix)
            for e in rename_keys(problems, own)]


def check_ppo(config: PPOStage, world: int) -> preflight.RunInputs:
    """Opens model and data. world: all of torchrun's ranks. Raises all problems together."""
    generators = config.rollout.num_ranks or 0
    if generators >= world:
        smallest = state.Layout.from_config(config.parallel, 1).ranks_per_replica
        raise ConfigError(
            f"rollout.num_ranks = {generators} of {world} ranks leave none to train",
            where="rollout.num_ranks",
            expected=f"torchrun with {generators + smallest} ranks or more",
            fix=ranks_fix(smallest, world=world - generators, apart=generators),
        )
    trainers = world - generators
    opened = preflight.open_run(config, world=trainers)
    source, problems = opened.source, opened.problems
    if source is not None:
        tp = config.rollout.tensor_parallel_size
        problems.extend(check_vllm_model(source.spec, tp=tp, world=generators or trainers,
                                         key="rollout.tensor_parallel_size"))
        problems.extend(_check_stop_tokens(config, source))
        weights, placement = config.rollout.weights, config.rollout.placement
        problems.extend(check_weights(source.spec, weights, dtype=config.model.dtype, placement=placement))
        problems.extend(preflight.check_prompt_budget(config, source, opened.datasets()))
        parallel, critic = config.parallel, config.ppo.critic
        problems.extend(check_reward_sources(config.reward, source, parallel=parallel, world=trainers, critic=critic))
        problems.extend(_check_critic(config, source, trainers, apart=generators))
        if config.ptx.coef > 0:
            problems.extend(open_ptx(config, source)[1])
        if opened.datasets():
            _, data = opened.datasets()[0]
            problems.extend(check_environment(config.rollout.environment, load_tokenizer(source.hf_dir), data.meta))
    if (train := opened.whole_train) is not None:
        _check_steps(config, opened, make_prompt_order(config, train).total_steps)
    inputs = opened.inputs()
    return replace(inputs, notes=(*inputs.notes, *truncation_notes(config)))


def _check_stop_tokens(config: PPOStage, source: ModelSource) -> list[ConfigError]:
    ids, size = config.rollout.stop_token_ids, source.spec.vocab_size
    beyond = [i for i in ids if i >= size]
    what = f"rollout.stop_token_ids = {', '.join(map(str, beyond))}: {source.path} has no such token"
    return [ConfigError(what, where="rollout.stop_token_ids", expected=f"0 to {size - 1}")] if beyond else []


def _check_steps(config: PPOStage, opened: preflight.Opened, rollouts: int) -> None:
    opened.check_schedule(rollouts * config.updates_per_rollout)
    if (alone := config.ppo.critic_warmup_steps) >= rollouts:
        opened.notes.append(f"ppo.critic_warmup_steps = {alone} covers all {rollouts} rollouts: no actor is trained")
