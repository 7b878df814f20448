"""Estimated memory of a rank: its model and optimizer, and the activations of an update (activations.py)."""

from __future__ import annotations

from typing import Any

from mrlhf.config.options import DPOStage, ParallelConfig, PPOStage, TrainingConfig
from mrlhf.data.blend import Dataset
from mrlhf.memory.activations import ActivationMemory, MicroBatchShape, estimate_activations
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel.state import Layout

GIB = 2**30


def model_bytes(spec: ModelSpec, *, dtype: str, tp: int, pp: int, dp: int, trained: bool, distributed_optimizer: bool,
                ep: int = 1) -> int:
    """Bytes on the rank that holds most.

    Weights; for a trained model also fp32 gradients, Adam's two moments and (bf16) fp32 master weights.
    TP x PP divides the layers, but PP alone divides the projections to latent vectors. A rank holds num / EP whole
    experts; with EP 1, TP divides every expert. TP divides the embedding and the head, each on one pipeline stage.
    """
    vocabulary = spec.padded_vocab_size * spec.hidden_size
    layers = spec.num_parameters - spec.end_parameters - spec.expert_parameters - spec.whole_parameters
    at_ends = vocabulary if pp > 1 or spec.tied else 2 * vocabulary
    dense = layers // (tp * pp) + spec.whole_parameters // pp + at_ends // tp
    experts = spec.expert_parameters // ((ep if ep > 1 else tp) * pp)
    weight = 4 if dtype == "float32" else 2
    if not trained:
        return (dense + experts) * weight
    state = 8 + (4 if dtype == "bfloat16" else 0)
    expert_dp = tp * dp // ep if ep > 1 else dp
    dense_shards, expert_shards = (dp, expert_dp) if distributed_optimizer else (1, 1)
    optimizer = dense * state // dense_shards + experts * state // expert_shards
    return (dense + experts) * (weight + 4) + optimizer


def layout_options(config: TrainingConfig, parallel: ParallelConfig, world: int) -> dict[str, Any]:
    """Arguments of `model_bytes`."""
    layout, distributed = Layout.from_config(parallel, world), config.optim.use_distributed_optimizer
    dp = max(1, layout.dp * layout.cp)  # context-parallel ranks shard the optimizer state too
    return {"tp": layout.tp, "pp": layout.pp, "dp": dp, "ep": layout.ep, "distributed_optimizer": distributed}


def memory_table(
    config: TrainingConfig, spec: ModelSpec, *, world: int, others: dict[str, ModelSpec]
) -> list[tuple[str, int]]:
    """[(what, bytes per rank)]. others: the further models of PPO by role (critic, reward).

    Without rollout.kv_cache_mib vLLM's cache is not among them: it takes what is free.
    """
    dtype, actor = config.model.dtype, layout_options(config, config.parallel, world)
    reference = ("reference", model_bytes(spec, dtype=dtype, **actor, trained=False))
    rows = [("actor" if config.stage == "ppo" else "model", model_bytes(spec, dtype=dtype, **actor, trained=True))]
    if isinstance(config, PPOStage):
        critic = layout_options(config, config.critic_parallel, world)
        for role, other in others.items():
            is_critic = role == "critic"
            rows.append((role, model_bytes(other, dtype=dtype, **(critic if is_critic else actor), trained=is_critic)))
        if config.kl.coef > 0:
            rows.append(reference)
        rollout = config.rollout
        replica: dict[str, Any] = {"tp": rollout.tensor_parallel_size, "pp": 1, "dp": 1, "distributed_optimizer": False}
        rows.append(("vLLM weights", model_bytes(spec, dtype=dtype, **replica, trained=False)))
        if rollout.kv_cache_mib is not None:
            rows.append(("vLLM key/value cache", rollout.kv_cache_mib << 20))
    elif isinstance(config, DPOStage) and config.dpo.reference == "online":
        rows.append(reference)
    return rows


def largest_micro_batch(config: TrainingConfig, data: Dataset) -> MicroBatchShape:
    """The largest micro-batch that data and configuration allow; a row of PPO is the longest prompt and answer."""
    train, packed = config.train, config.data.packing
    if isinstance(config, PPOStage):
        lengths = [data.max_length + config.rollout.max_new_tokens]
    else:
        lengths = data.longest_row(packing=packed)
    longest, row = max(lengths), sum(lengths)
    tokens = max(row, train.max_tokens_per_micro_batch or train.micro_batch_size * row)
    return MicroBatchShape(tokens, longest, 1 if packed else max(1, tokens // longest), packed)


def update_activations(
    config: TrainingConfig, spec: ModelSpec, data: Dataset, *, world: int, critic: ModelSpec | None
) -> ActivationMemory:
    """Activations of an update on a GPU; PPO updates actor and critic in turn, so the larger of the two counts."""
    shape, train = largest_micro_batch(config, data), config.train

    def activations_of(model: ModelSpec, parallel: ParallelConfig, head: str) -> ActivationMemory:
        count = None
        if train.max_tokens_per_micro_batch is None:
            dp = max(1, Layout.from_config(parallel, world).dp)
            count = max(1, train.global_batch_size // (train.micro_batch_size * dp))
        return estimate_activations(model, parallel, shape, dtype=config.model.dtype, head=head, micro_batches=count)

    actor = activations_of(spec, config.parallel, "value" if config.stage == "rm" else "lm")
    if critic is None or not isinstance(config, PPOStage):
        return actor
    return max(actor, activations_of(critic, config.critic_parallel, "value"), key=lambda memory: memory.total)
