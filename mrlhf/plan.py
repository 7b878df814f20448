"""Memory of a rank, from the same numbers that build the model. Activations are not in it: they depend on the batch."""

from __future__ import annotations

from typing import Any

from mrlhf.config import ParallelConfig, PPOStage
from mrlhf.models.spec import ModelSpec
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


def memory_table(stage: str, config: Any, spec: ModelSpec, *, world: int, others: dict[str, ModelSpec]) -> list[tuple[str, int]]:
    """[(what, bytes a rank)]; `others`: further models of ppo by role (critic, reward)."""

    def cut(parallel: ParallelConfig) -> dict[str, Any]:
        layout = Layout.of(parallel, world)
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
    elif stage == "dpo" and config.dpo.reference == "online":
        rows.append(("reference", model_bytes(spec, **usual, trained=False)))
    return rows
