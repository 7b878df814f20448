"""Estimated memory of a rank: its models between steps (model_state.py), and its peak in an update (activations.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mrlhf.config.options import DPOStage, ParallelConfig, PPOStage, TrainingConfig
from mrlhf.data.blend import Dataset
from mrlhf.memory.activations import ActivationMemory, MicroBatchShape, stage_activations
from mrlhf.memory.model_state import ModelMemory, stage_memory
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel.state import Layout

GIB = 2**30


def model_bytes(spec: ModelSpec, *, dtype: str, tp: int, pp: int, dp: int, trained: bool, distributed_optimizer: bool,
                ep: int = 1) -> int:
    """Bytes of a model on the rank that holds most (model_state.py says what of)."""
    layout = Layout(tp * pp * dp, tp, pp, ep)
    stages = stage_memory(spec, layout, dtype=dtype, trained=trained, distributed_optimizer=distributed_optimizer)
    return max(stage.total for stage in stages)


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


@dataclass(frozen=True)
class UpdatePeak:
    """Bytes of the rank that needs most in an update of `role`."""

    role: str
    stage: int  # of the pipeline
    models: int  # that are on the device meanwhile: weights, gradients, optimizer state
    update: ActivationMemory

    @property
    def total(self) -> int:
        return self.models + self.update.total


def update_peak(
    config: TrainingConfig, spec: ModelSpec, data: Dataset, *, world: int, others: dict[str, ModelSpec]
) -> UpdatePeak:
    """The largest peak of a GPU in an update, among all ranks and, in PPO, the updates of actor and critic.

    others: as for `memory_table`. Not counted: what CUDA, NCCL and the allocator's fragments take.
    """
    shape, train = largest_micro_batch(config, data), config.train
    roles = {"actor": spec} | others
    if (config.kl.coef > 0) if isinstance(config, PPOStage) else _keeps_reference(config):
        roles["reference"] = spec
    models, updates, layouts = {}, {}, {}
    for role, model in roles.items():
        parallel = config.critic_parallel if isinstance(config, PPOStage) and role == "critic" else config.parallel
        layout, trained = Layout.from_config(parallel, world), role in ("actor", "critic")
        head = "lm" if role == "reference" or role == "actor" and config.stage != "rm" else "value"
        layouts[role] = layout
        models[role] = stage_memory(model, layout, dtype=config.model.dtype, head=head, trained=trained,
                                    distributed_optimizer=config.optim.use_distributed_optimizer)
        if trained:
            count = None
            if train.max_tokens_per_micro_batch is None:
                count = max(1, train.global_batch_size // (train.micro_batch_size * max(1, layout.dp)))
            updates[role] = stage_activations(model, parallel, shape, dtype=config.model.dtype, head=head,
                                              micro_batches=count)
    peaks = []
    for stages in {tuple(layout.coordinates(rank)[2] for layout in layouts.values()) for rank in range(world)}:
        stage_of = dict(zip(layouts, stages, strict=True))
        here = {role: models[role][stage] for role, stage in stage_of.items()}
        for role, moments in updates.items():
            held = _vllm_awake(config, spec) + sum(_on_device(config, each, here[each], role) for each in here)
            worst = max(moments[stage_of[role]], key=lambda moment: moment.total)
            peaks.append(UpdatePeak(role, stage_of[role], held, worst))
    return max(peaks, key=lambda peak: peak.total)


def update_activations(
    config: TrainingConfig, spec: ModelSpec, data: Dataset, *, world: int, critic: ModelSpec | None
) -> ActivationMemory:
    """What an update needs beside its models, on the rank that needs most."""
    others = {} if critic is None else {"critic": critic}
    return update_peak(config, spec, data, world=world, others=others).update


def _keeps_reference(config: TrainingConfig) -> bool:
    return isinstance(config, DPOStage) and config.dpo.reference == "online"


def _on_device(config: TrainingConfig, role: str, model: ModelMemory, updated: str) -> int:
    """What of a model is on the device while `updated` is updated."""
    if role == updated or not isinstance(config, PPOStage):
        return model.total
    offload = config.offload
    if role in ("actor", "critic"):
        return model.weights + model.gradients * (not offload.gradients) + model.optimizer * (not offload.optimizer)
    return model.weights * (not (offload.reference if role == "reference" else offload.reward))


def _vllm_awake(config: TrainingConfig, spec: ModelSpec) -> int:
    """vLLM's weights and cache, where it shares the trainer's ranks and does not sleep."""
    if not isinstance(config, PPOStage) or config.rollout.placement == "separate" or config.rollout.sleep:
        return 0
    weights = model_bytes(spec, dtype=config.model.dtype, tp=config.rollout.tensor_parallel_size, pp=1, dp=1,
                          trained=False, distributed_optimizer=False)
    return weights + ((config.rollout.kv_cache_mib or 0) << 20)
