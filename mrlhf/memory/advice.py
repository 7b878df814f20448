"""Which keys of a configuration would reduce the memory of a phase: those not in force yet that the model allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mrlhf.config.check import contradictions
from mrlhf.config.options import DPOStage, PPOStage, TrainingConfig
from mrlhf.memory.vllm_budget import CPU_CACHE_MIB
from mrlhf.models.families.spec import ModelSpec, check_layout
from mrlhf.parallel.state import Layout, check_batch

UPDATES = ("step", "update_actor", "update_critic")
PASSES = (*UPDATES, "prepare", "evaluate", "reward", "logprobs", "values")  # phases that run a Megatron model


def remedies(config: TrainingConfig, phase: str, *, spec: ModelSpec, world: int, cuda: bool) -> list[str]:
    """Lines `--key value (now ...)`, the cheapest remedy first.

    phase: "build", "prepare" (before the first step), "step", "evaluate", "save", "offload" (to the host), or a phase
    of PPO; world: the trainer's ranks.
    """
    lines: list[str] = []
    if phase in PASSES:
        lines += _smaller_batches(config, phase)
    if isinstance(config, PPOStage):
        lines += _offload_to_host(config, phase) if cuda else []
        lines += _smaller_vllm(config, phase, world=world, cuda=cuda)
    if isinstance(config, DPOStage) and config.dpo.reference == "online":
        lines.append("--dpo.reference precompute (now online: a second model in memory)")
    if phase == "save" and config.checkpoint.async_save:
        lines.append("--checkpoint.async_save false (now true: it copies what it writes)")
    if phase in UPDATES and config.parallel.recompute != "full":
        lines.append(f"--parallel.recompute full (now {config.parallel.recompute})")
    layout = Layout.from_config(config.parallel, world)
    if not config.optim.use_distributed_optimizer and layout.dp * layout.cp > 1:
        lines.append("--optim.use_distributed_optimizer true (now false: every rank has all of the optimizer's state)")
    if phase in PASSES or phase == "build":
        lines += _more_model_parallelism(config, phase, spec=spec, world=world)
    return lines or ["nothing in the configuration is left to change: more memory, or a smaller model"]


def _lower(key: str, now: int) -> list[str]:
    """Half of it, where it is above 1."""
    return [f"--{key} {now // 2} (now {now})"] if now > 1 else []


def _smaller_batches(config: TrainingConfig, phase: str) -> list[str]:
    lines, train = [], config.train
    if train.max_tokens_per_micro_batch is not None:
        now = train.max_tokens_per_micro_batch
        half = max(1, now // 2)
        lines.append(f"--train.max_tokens_per_micro_batch {half} (now {now}; not less than the longest row)")
    elif train.micro_batch_size > 1:
        lines.append(f"--train.micro_batch_size {_half(train.micro_batch_size)} (now {train.micro_batch_size})")
    if isinstance(config, PPOStage) and phase == "update_actor" and config.ptx.coef > 0:
        now = config.ptx.micro_batch_size
        lines += [f"--ptx.micro_batch_size {_half(now)} (now {now})"] if now > 1 else []
    return lines


def _half(n: int) -> int:
    """The largest divisor of n below n: it divides whatever n divides."""
    return next(d for d in range(n // 2, 0, -1) if n % d == 0)


def _offload_to_host(config: PPOStage, phase: str) -> list[str]:
    """For CUDA only: a CPU run has no second memory to offload to."""
    has_other_trainer = config.ppo.estimator_row.needs_critic or not phase.startswith("update")
    useful = {
        "optimizer": has_other_trainer,
        "gradients": has_other_trainer,
        "reference": config.kl.coef > 0 and phase != "logprobs",
        "reward": any(s.startswith("model:") for s in config.reward.sources) and phase not in ("reward", "evaluate"),
    }
    on = {key: getattr(config.offload, key) for key in useful}
    if phase == "offload":
        return [f"--offload.{key} false (now true)" for key in useful if on[key]]
    wanted = [key for key, use in useful.items() if use and not on[key] and phase != "build"]
    return [f"--offload.{key} true (now false)" for key in wanted]


def _smaller_vllm(config: PPOStage, phase: str, *, world: int, cuda: bool) -> list[str]:
    """Where vLLM shares the rank: in phases in which it generates, and in the others if it does not sleep."""
    rollout = config.rollout
    if rollout.placement == "separate" and phase not in ("gen", "reshard"):
        return []
    generates = phase in ("gen", "evaluate", "reshard")
    if not generates and cuda and rollout.sleep and phase != "build":
        return []
    lines = [] if generates or not cuda or rollout.sleep else ["--rollout.sleep true (now false)"]
    if cuda and rollout.kv_cache_mib is None:
        lines.append("--rollout.kv_cache_mib 1024 (now unset: all that was free at the start)")
    else:
        lines += _lower("rollout.kv_cache_mib", rollout.kv_cache_mib or CPU_CACHE_MIB)
    if phase in ("gen", "evaluate"):
        lines += _lower("rollout.max_num_seqs", rollout.max_num_seqs)
    if phase == "reshard":
        lines += _lower("rollout.reshard_bucket_mib", rollout.reshard_bucket_mib)
    if rollout.placement == "colocated" and rollout.weights == "plain":
        n = rollout.tensor_parallel_size
        lines.append(f"--rollout.placement separate --rollout.num_ranks {n} (now colocated), on {world + n} ranks "
                     f"instead of {world}")
    return lines


def _more_model_parallelism(config: TrainingConfig, phase: str, *, spec: ModelSpec, world: int) -> list[str]:
    """Twice as many ranks per model, where that divides it; if `world` ranks are too few, on twice as many."""
    is_critic = isinstance(config, PPOStage) and phase in ("values", "update_critic")
    actor = config.parallel
    now = config.critic_parallel if isinstance(config, PPOStage) and is_critic else actor
    tp, pp, cp = now.tensor_model_parallel_size, now.pipeline_model_parallel_size, now.context_parallel_size
    # sequence_parallel is one option for actor and critic, and needs a TP above 1 in the actor
    sequence = not actor.sequence_parallel and (not is_critic or actor.tensor_model_parallel_size > 1)
    lines = ["--parallel.sequence_parallel true (now false)"] if tp > 1 and sequence else []

    def offer(text: str, **sizes: Any) -> None:
        """sizes: of the actor, or `critic_...`."""
        own = {name: size for name, size in sizes.items() if name.startswith("critic_")}
        new = replace(actor, **{name: size for name, size in sizes.items() if name not in own})
        layouts, answers, changed = [new], 0, replace(config, parallel=new)
        if isinstance(changed, PPOStage):
            answers = changed.rollout.batch_size * changed.rollout.n
            changed = replace(changed, ppo=replace(changed.ppo, **own))
            layouts += [changed.critic_parallel] if changed.ppo.estimator_row.needs_critic else []
        if contradictions(changed):
            return
        for ranks in (world, 2 * world):
            if not any(check_layout(each, spec, ranks) or check_batch(config.train, each, ranks, answers=answers)
                       for each in layouts):
                lines.append(text if ranks == world else f"{text}, on {ranks} training ranks instead of {world}")
                return

    prefix, name = ("ppo.", "critic_tensor_model_parallel_size") if is_critic else (
        "parallel.", "tensor_model_parallel_size")
    offer(f"--{prefix}{name} {2 * tp} (now {tp}){', --parallel.sequence_parallel true' if sequence else ''}",
          **{name: 2 * tp, "sequence_parallel": actor.sequence_parallel or sequence})
    even = now.num_layers_in_first_pipeline_stage is None and now.num_layers_in_last_pipeline_stage is None
    if phase == "build" and even and now.interleaved_chunks is None:
        offer(f"--parallel.pipeline_model_parallel_size {2 * pp} (now {pp})", pipeline_model_parallel_size=2 * pp)
    if phase != "build":
        offer(f"--parallel.context_parallel_size {2 * cp} (now {cp})", context_parallel_size=2 * cp)
    return lines
