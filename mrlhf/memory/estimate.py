"""Memory of a rank, from the same numbers that build the model, and an estimate of what an update holds beside (activations.py)."""

from __future__ import annotations

from typing import Any

from mrlhf.config.options import DPOStage, ParallelConfig, PPOStage, TrainingConfig
from mrlhf.data.blend import Dataset
from mrlhf.memory.activations import Activations, Rows, activations
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel.state import Layout

GIB = 2**30


def model_bytes(spec: ModelSpec, *, dtype: str, tp: int, pp: int, dp: int, trained: bool, distributed_optimizer: bool, ep: int = 1) -> int:
    """Weights, and for a trained model fp32 gradients, Adam's two moments and (bf16) fp32 master weights, of the fullest rank.

    Layers are cut by TP x PP (projections to latent vectors by PP alone); of experts each rank has num / EP whole ones, or with EP 1 a
    share of all by TP; the embedding and the head are cut by TP, each on one stage.
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
    shared = dense * state // (dp if distributed_optimizer else 1) + experts * state // (expert_dp if distributed_optimizer else 1)
    return (dense + experts) * (weight + 4) + shared


def memory_table(stage: str, config: TrainingConfig, spec: ModelSpec, *, world: int, others: dict[str, ModelSpec]) -> list[tuple[str, int]]:
    """[(what, bytes a rank)]; `others`: further models of ppo by role (critic, reward)."""

    def cut(parallel: ParallelConfig) -> dict[str, Any]:
        layout = Layout.from_config(parallel, world)
        return {
            "dtype": config.model.dtype,
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": max(1, layout.dp * layout.cp),  # context-parallel ranks share the optimizer's state too
            "ep": layout.ep,
            "distributed_optimizer": config.optim.use_distributed_optimizer,
        }

    usual = cut(config.parallel)
    rows = [("actor" if stage == "ppo" else "model", model_bytes(spec, **usual, trained=True))]
    if isinstance(config, PPOStage):
        for role, other in others.items():
            own = cut(config.critic_parallel) if role == "critic" else usual
            rows.append((role, model_bytes(other, **own, trained=role == "critic")))
        if config.kl.coef > 0:
            rows.append(("reference", model_bytes(spec, **usual, trained=False)))
        rollout_tp = config.rollout.tensor_parallel_size
        rows.append(
            (
                "vLLM weights",
                model_bytes(spec, dtype=config.model.dtype, tp=rollout_tp, pp=1, dp=1, trained=False, distributed_optimizer=False),
            )
        )
        rows.append(("vLLM key/value cache", config.rollout.kv_cache_mib << 20))
    elif isinstance(config, DPOStage) and config.dpo.reference == "online":
        rows.append(("reference", model_bytes(spec, **usual, trained=False)))
    return rows


def largest_rows(config: TrainingConfig, data: Dataset) -> Rows:
    """The largest micro-batch that the data and the configuration allow; of ppo, the longest prompt with the longest answer each time."""
    train, packed = config.train, config.data.packing
    if isinstance(config, PPOStage):
        lengths = [data.max_length + config.rollout.max_new_tokens]
    else:
        lengths = data.longest_row(packing=packed)
    longest, row = max(lengths), sum(lengths)
    tokens = max(row, train.max_tokens_per_micro_batch or train.micro_batch_size * row)
    return Rows(tokens, longest, 1 if packed else max(1, tokens // longest), packed)


def update_activations(stage: str, config: TrainingConfig, spec: ModelSpec, data: Dataset, *, world: int, critic: ModelSpec | None) -> Activations:
    """Of a GPU. Updates of actor and critic come one after the other: the larger."""
    rows, train = largest_rows(config, data), config.train

    def of(model: ModelSpec, parallel: ParallelConfig, head: str) -> Activations:
        count = None
        if train.max_tokens_per_micro_batch is None:
            count = max(1, train.global_batch_size // (train.micro_batch_size * max(1, Layout.from_config(parallel, world).dp)))
        return activations(model, parallel, rows, dtype=config.model.dtype, head=head, micro_batches=count)

    found = [of(spec, config.parallel, "value" if stage == "rm" else "lm")]
    if critic is not None and isinstance(config, PPOStage):
        found.append(of(critic, config.critic_parallel, "value"))
    return max(found, key=lambda one: one.total)
