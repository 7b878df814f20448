"""What a layout needs of a model with experts, and what a rank holds of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrlhf.config.options import ModelConfig, ParallelConfig
from mrlhf.memory.estimate import model_bytes
from mrlhf.models.families.spec import Experts, Latent, Layer, ModelSpec, check_layout

DENSE = ModelSpec("llama", 4, 64, 128, 8, 4, 8, 256, 128, 1e-6, tied=False, layers=(Layer(),) * 4)
MOE = replace(DENSE, family="mixtral", layers=(Layer(moe=True),) * 4, experts=Experts(8, 2, 96))


def refusals(spec: ModelSpec, world: int, *, trained: bool = True, **sizes: int | bool) -> list[str]:
    names = {"tp": "tensor", "ep": "expert", "pp": "pipeline"}
    names = {short: f"{name}_model_parallel_size" for short, name in names.items()}
    parallel = ParallelConfig(**{names.get(k, k): v for k, v in sizes.items()})  # type: ignore[arg-type]
    return [str(error) for error in check_layout(parallel, spec, world, trained=trained)]


def test_experts_and_ranks() -> None:
    assert refusals(MOE, 4, tp=2, ep=4, sequence_parallel=True) == []
    assert refusals(MOE, 8, tp=2, pp=2, ep=4, sequence_parallel=True) == []
    (wrong,) = refusals(MOE, 4, ep=3)
    assert "3 does not divide the model's 8 experts and the 4 ranks of a pipeline stage" in wrong
    assert "expected: 1, 2, 4" in wrong
    (wrong,) = refusals(MOE, 2, ep=8)
    assert "expected: 1, 2\n" in wrong and "--parallel.expert_model_parallel_size 2" in wrong
    (wrong,) = refusals(DENSE, 2, ep=2)
    assert "has no experts" in wrong
    assert refusals(DENSE, 2, ep=2, trained=False) == []  # a reward model beside an actor with experts


def test_experts_under_tensor_parallelism_need_sequence_parallelism_to_train() -> None:
    (wrong,) = refusals(MOE, 2, tp=2)
    assert "sequence parallelism" in wrong and "--parallel.sequence_parallel true" in wrong
    assert refusals(MOE, 2, tp=2, trained=False) == []


@pytest.mark.parametrize(("tp", "ep", "dp"), [(1, 1, 1), (2, 1, 1), (1, 4, 4), (2, 8, 4)])
def test_memory_of_experts(tp: int, ep: int, dp: int) -> None:
    cut = {"dtype": "bfloat16", "pp": 1, "trained": False, "distributed_optimizer": True}
    experts = 4 * 8 * 3 * 96 * 64
    assert MOE.expert_parameters == experts
    whole = 4 * (2 * 64 + 8 * 64) + 64  # norms and routers
    dense = MOE.num_parameters - experts - whole
    expected = 2 * (dense // tp + whole + experts // (ep if ep > 1 else tp))
    assert model_bytes(MOE, tp=tp, ep=ep, dp=dp, **cut) == expected


def test_memory_of_latent_attention() -> None:
    """Every tensor-parallel rank has the projections down to the latent vectors whole."""
    spec = replace(DENSE, family="deepseek_v3", num_query_groups=8, latent=Latent(16, 24, 8, 4))
    whole = 4 * (64 * (24 + 16 + 4) + 24 + 16 + 2 * 64) + 64  # the vectors' projections, and all norms
    cut = {"dtype": "float32", "pp": 1, "dp": 1, "trained": False, "distributed_optimizer": False}
    assert model_bytes(spec, tp=1, **cut) == 4 * spec.num_parameters  # the padded vocabulary is the vocabulary
    assert model_bytes(spec, tp=2, **cut) == 4 * ((spec.num_parameters - whole) // 2 + whole)


def test_experts_are_named_at_the_start() -> None:
    from mrlhf.models.layers.router_losses import balance_summary

    assert DENSE.summary() == f"llama, {DENSE.num_parameters:,} parameters"
    assert MOE.summary().endswith("2 of 8 experts)")
    assert (
        balance_summary(ModelConfig(".")) == "experts: trained without a load-balancing loss (model.moe_aux_loss_coeff)"
    )
    assert (
        balance_summary(ModelConfig(".", moe_z_loss_coeff=0.1))
        == "experts: load-balancing loss x 0, router z-loss x 0.1"
    )
