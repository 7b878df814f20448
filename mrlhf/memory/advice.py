"""Which keys of a configuration would let a phase do with less memory: those that are not in force yet, and that the model allows."""

from __future__ import annotations

from dataclasses import replace

from mrlhf.config.options import DPOStage, ParallelConfig, PPOStage, TrainingConfig
from mrlhf.models.families.spec import ModelSpec, check_layout
from mrlhf.parallel.state import Layout, check_batch

UPDATES = ("step", "update_actor", "update_critic")
PASSES = (*UPDATES, "prepare", "evaluate", "reward", "logprobs", "values")  # that run a model of Megatron's


def remedies(config: TrainingConfig, phase: str, *, spec: ModelSpec, world: int, cuda: bool) -> list[str]:
    """`--key value (now ...)`, what costs least first.

    phase: "build", "prepare" (before the first step), "step", "evaluate", "save", "offload" (to the host), or one of PPO's; world: the
    trainer's ranks.
    """
    found: list[str] = []
    if phase in PASSES:
        found += _smaller_batches(config, phase)
    if isinstance(config, PPOStage):
        found += _host(config, phase) if cuda else []
        found += _vllm(config, phase, cuda=cuda)
    if isinstance(config, DPOStage) and config.dpo.reference == "online":
        found.append("--dpo.reference precompute (now online: a second model in memory)")
    if phase == "save" and config.checkpoint.async_save:
        found.append("--checkpoint.async_save false (now true: it copies what it writes)")
    if phase in UPDATES and config.parallel.recompute != "full":
        found.append(f"--parallel.recompute full (now {config.parallel.recompute})")
    layout = Layout.from_config(config.parallel, world)
    if not config.optim.use_distributed_optimizer and layout.dp * layout.cp > 1:
        found.append("--optim.use_distributed_optimizer true (now false: every rank has all of the optimizer's state)")
    if phase in PASSES or phase == "build":
        found += _more_cuts(config, phase, spec=spec, world=world)
    return found or ["nothing in the configuration is left to change: more memory, or a smaller model"]


def _smaller_batches(config: TrainingConfig, phase: str) -> list[str]:
    found, train = [], config.train
    if train.max_tokens_per_micro_batch is not None:
        now = train.max_tokens_per_micro_batch
        found.append(f"--train.max_tokens_per_micro_batch {max(1, now // 2)} (now {now}; not less than the longest row)")
    elif train.micro_batch_size > 1:
        found.append(f"--train.micro_batch_size {_half(train.micro_batch_size)} (now {train.micro_batch_size})")
    if isinstance(config, PPOStage) and phase == "update_actor" and config.ptx.coef > 0 and config.ptx.micro_batch_size > 1:
        found.append(f"--ptx.micro_batch_size {_half(config.ptx.micro_batch_size)} (now {config.ptx.micro_batch_size})")
    return found


def _half(n: int) -> int:
    """The largest divisor below n: whatever n divided, it divides."""
    return next(d for d in range(n // 2, 0, -1) if n % d == 0)


def _host(config: PPOStage, phase: str) -> list[str]:
    """CUDA only: on CPU there is nowhere else to go."""
    other_is_there = config.ppo.estimator == "gae" or not phase.startswith("update")
    useful = {
        "optimizer": other_is_there,
        "gradients": other_is_there,
        "reference": config.kl.coef > 0 and phase != "logprobs",
        "reward": any(source.startswith("model:") for source in config.reward.sources) and phase not in ("reward", "evaluate"),
    }
    on = {key: getattr(config.offload, key) for key in useful}
    if phase == "offload":
        return [f"--offload.{key} false (now true)" for key in useful if on[key]]
    return [] if phase == "build" else [f"--offload.{key} true (now false)" for key, use in useful.items() if use and not on[key]]


def _vllm(config: PPOStage, phase: str, *, cuda: bool) -> list[str]:
    """Where vLLM shares the rank: while it works, and else where it does not sleep."""
    rollout, found = config.rollout, []
    if rollout.placement == "separate" and phase not in ("gen", "reshard"):
        return []
    generates = phase in ("gen", "evaluate", "reshard")
    if not generates and cuda and rollout.sleep and phase != "build":
        return []
    if not generates and cuda and not rollout.sleep:
        found.append("--rollout.sleep true (now false)")
    if rollout.kv_cache_mib > 1:
        found.append(f"--rollout.kv_cache_mib {rollout.kv_cache_mib // 2} (now {rollout.kv_cache_mib})")
    if phase in ("gen", "evaluate") and rollout.max_num_seqs > 1:
        found.append(f"--rollout.max_num_seqs {rollout.max_num_seqs // 2} (now {rollout.max_num_seqs})")
    if phase == "reshard" and rollout.reshard_bucket_mib > 1:
        found.append(f"--rollout.reshard_bucket_mib {rollout.reshard_bucket_mib // 2} (now {rollout.reshard_bucket_mib})")
    if rollout.placement == "colocated":
        found.append("--rollout.placement separate --rollout.num_ranks N (now colocated)")
    return found


def _more_cuts(config: TrainingConfig, phase: str, *, spec: ModelSpec, world: int) -> list[str]:
    """Twice as many ranks to a model, where it divides; more of torchrun's ranks where these do not suffice."""
    of_critic = isinstance(config, PPOStage) and phase in ("values", "update_critic")
    now = config.critic_parallel if isinstance(config, PPOStage) and of_critic else config.parallel
    prefix = "ppo.critic_" if of_critic else "parallel."
    tp, pp, cp = now.tensor_model_parallel_size, now.pipeline_model_parallel_size, now.context_parallel_size
    found = []
    if tp > 1 and not now.sequence_parallel:
        found.append("--parallel.sequence_parallel true (now false)")

    def offer(new: ParallelConfig, text: str) -> None:
        ranks = next((n for n in (world, 2 * world) if not check_layout(new, spec, n) and not check_batch(config.train, new, n)), None)
        if ranks is not None:
            found.append(text if ranks == world else f"{text}, on {ranks} ranks instead of {world}")

    offer(
        replace(now, tensor_model_parallel_size=2 * tp, sequence_parallel=True),
        f"--{prefix}tensor_model_parallel_size {2 * tp} (now {tp})"
        + ("" if now.sequence_parallel else ", --parallel.sequence_parallel true"),
    )
    plain = now.virtual_pipeline_model_parallel_size is None and now.num_layers_in_first_pipeline_stage is None
    if phase == "build" and plain and now.num_layers_in_last_pipeline_stage is None:
        offer(replace(now, pipeline_model_parallel_size=2 * pp), f"--{prefix}pipeline_model_parallel_size {2 * pp} (now {pp})")
    if phase != "build":
        offer(replace(now, context_parallel_size=2 * cp), f"--parallel.context_parallel_size {2 * cp} (now {cp})")
    return found
