"""What is rehearsed: every kind of model (zoo.py) in every layout of batches and stage, and two of them in every
parallel layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo import KINDS, MOE

PADDINGS = ("packed", "right", "left")
STAGES = ("sft", "rm", "dpo", "ppo")
# beyond a stage: the weights' way to vLLM, and what a save plans
OF_MODEL = ("reshard", "checkpoint")


@dataclass(frozen=True)
class Layout:
    """parallel: of ParallelConfig. ranks: those that are rehearsed; they share groups, so their messages must pair."""

    world: int
    ranks: tuple[int, ...]
    parallel: dict[str, Any]
    optim: dict[str, Any]
    offload: bool = False
    neftune: float = 0.0


def _layout(ranks: tuple[int, ...], *, world: int = 4, offload: bool = False, plain: bool = False,
            neftune: float = 0.0, **parallel: Any) -> Layout:  # fmt: skip
    return Layout(world, ranks, parallel, {"use_distributed_optimizer": not plain}, offload, neftune)


# the distributed optimizer and both overlaps are the default on CUDA
LAYOUTS = {
    "dp2": _layout((0,), world=2),
    "dp4": _layout((0, 3)),
    "dp4plain": _layout((0, 3), plain=True, overlap_grad_reduce=False, overlap_param_gather=False),
    "tp2": _layout((0, 1), tensor_model_parallel_size=2),
    "tp2sp": _layout((0, 1), neftune=5.0, tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": _layout((0, 2), pipeline_model_parallel_size=2),
    "vpp2": _layout((0, 2), pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "cp2": _layout((0, 1), context_parallel_size=2),
    "ep2": _layout((0, 1), expert_model_parallel_size=2),
    "tp2sp_cp2_pp2": _layout((0, 1, 4), world=8, tensor_model_parallel_size=2, sequence_parallel=True,
                             context_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2sp_ep2": _layout((0, 1), tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
    "full": _layout((0,), world=2, recompute="full"),
    "selective": _layout((0,), world=2, recompute="selective"),
    "offload": _layout((0,), world=2, offload=True),
}  # fmt: skip


_PADDED = ("tp2sp", "cp2", "pp2", "vpp2", "tp2sp_cp2_pp2")  # cut rows, or send them on


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str
    padding: str
    stage: str

    def __str__(self) -> str:
        return "-".join((self.kind, self.layout, self.padding, self.stage))


def of_families(part: int, parts: int) -> list[Case]:
    """Every kind, on two data-parallel ranks."""
    kinds = list(KINDS)[part::parts]
    return [Case(kind, "dp2", padding, stage) for kind in kinds for padding in PADDINGS for stage in STAGES]


def of_layouts(kind: str) -> list[Case]:
    """Packed batches through every stage, padded ones where the shape of a row matters."""
    left_out = ("tp2",) if kind in MOE else ("ep2", "tp2sp_ep2")  # Megatron wants SP beside TP to train experts
    layouts = [name for name in LAYOUTS if name not in ("dp2", *left_out)]
    each = [("packed", stage) for stage in (*STAGES, *OF_MODEL)]
    padded = [("right", "sft"), ("right", "rm")]
    return [Case(kind, name, *which) for name in layouts for which in (*each, *(padded if name in _PADDED else ()))]
