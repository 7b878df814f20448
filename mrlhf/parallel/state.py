"""Process groups: torchrun's world cut into tensor-, context-, data- and pipeline-parallel groups by Megatron.

Rank order is Megatron's "tp-cp-dp-pp": rank = tp + TP * (cp + CP * (dp + DP * pp)). A plain process without torchrun is a
world of one.

With experts the TP x CP x DP ranks of a stage share them: EP > 1 gives each rank whole experts, num / EP of them, and EP = 1
cuts every expert by TP. (EP = 1 with whole experts on every rank would reduce their gradients over the wrong group.)
"""

from __future__ import annotations

import datetime
import math
import os
import socket
import sys
import uuid
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from mrlhf.config.options import ParallelConfig, TrainConfig
from mrlhf.errors import ConfigError
from mrlhf.parallel import device, watch
from mrlhf.parallel.rendezvous import fresh_store


@dataclass(frozen=True)
class Layout:
    """How many ranks there are of each kind, and how the pipeline's divide the layers."""

    world: int
    tp: int
    pp: int
    ep: int = 1
    cp: int = 1
    pieces: int = 1  # of the model on each pipeline rank
    first_layers: int | None = None  # of the first pipeline stage, where it is uneven
    last_layers: int | None = None

    @staticmethod
    def of(parallel: ParallelConfig, world: int) -> Layout:
        return Layout(
            world,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.context_parallel_size,
            parallel.virtual_pipeline_model_parallel_size or 1,
            parallel.num_layers_in_first_pipeline_stage,
            parallel.num_layers_in_last_pipeline_stage,
        )

    @property
    def smallest(self) -> int:
        """Ranks that one data-parallel replica takes."""
        return self.tp * self.cp * self.pp

    @property
    def dp(self) -> int:
        return self.world // self.smallest

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) of a rank."""
        return rank % self.tp, rank // (self.tp * self.cp) % self.dp, rank // (self.tp * self.cp * self.dp)

    def stages(self, num_layers: int) -> list[int]:
        """The pipeline rank of every layer: stage after stage, and so once round for each piece of an interleaved pipeline."""
        ends = [n for n in (self.first_layers, self.last_layers) if n is not None]
        layers = [(num_layers - sum(ends)) // max(1, self.pp - len(ends))] * self.pp
        layers[0] = layers[0] if self.first_layers is None else self.first_layers
        layers[-1] = layers[-1] if self.last_layers is None else self.last_layers
        return [rank for _ in range(self.pieces) for rank in range(self.pp) for _ in range(layers[rank] // self.pieces)]

    def expert_rank(self, rank: int) -> int:
        """Which of the EP shares of the experts a rank holds."""
        return rank % (self.tp * self.cp * self.dp) % self.ep

    def describe(self, train: TrainConfig) -> str:
        """The arithmetic of a step."""
        parts = f"micro {train.micro_batch_size} x accumulation {train.global_batch_size // (train.micro_batch_size * self.dp)}"
        if train.max_tokens_per_micro_batch is not None:
            parts = f"micro-batches of up to {train.max_tokens_per_micro_batch:,} tokens"
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        experts = f", experts over {self.ep}" if self.ep > 1 else ""
        return (
            f"global {train.global_batch_size} = {parts} x dp {self.dp}   "
            f"({self.world} ranks = tp {self.tp} x pp {self.pp}{context} x dp {self.dp}{experts})"
        )


@dataclass(frozen=True)
class Groups:
    """The process groups of one layout, as Megatron's constructors and functions take them, and this rank's place in it."""

    parallel: ParallelConfig
    layout: Layout
    dp_rank: int
    collection: ProcessGroupCollection

    @property
    def is_last_stage(self) -> bool:
        return self.collection.pp.rank() == self.collection.pp.size() - 1


_groups: Groups | None = None


def groups() -> Groups:
    """The groups of the run's own layout, `parallel.*`."""
    assert _groups is not None, "state.initialize makes them"
    return _groups


def groups_for(parallel: ParallelConfig) -> Groups:
    """Collective over the world. Groups of another layout of the same ranks, beside the run's own; for the run's layout its own."""
    return groups() if parallel == groups().parallel else _make_groups(parallel)


def _make_groups(parallel: ParallelConfig) -> Groups:
    layout = Layout.of(parallel, dist.get_world_size())
    ranks = torch.arange(layout.world)
    dense = ranks.view(layout.pp, layout.dp, layout.cp, layout.tp)
    experts = ranks.view(layout.pp, -1, layout.ep, expert_tensor_parallel_size(parallel))
    timeout = datetime.timedelta(minutes=max(1, round(parallel.timeout_minutes)))

    def group(grid: torch.Tensor, *dims: int) -> dist.ProcessGroup:
        """This rank's group along `dims` of the grid: ranks that differ in no other dimension."""
        others = [dim for dim in range(4) if dim not in dims]
        rows = grid.permute(*others, *dims).reshape(-1, math.prod(grid.shape[dim] for dim in dims))
        return dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0]

    pp, dp, cp, tp = range(4)
    dp_cp, expt_dp = group(dense, dp, cp), group(experts, dp)
    # The first and the last stage share a tied embedding. Ranks between them, and all ranks of one stage, have no such group.
    ends = dense[[0, -1]].flatten(1).t() if layout.pp > 1 else None
    collection = ProcessGroupCollection(
        tp=group(dense, tp),
        cp=group(dense, cp),
        pp=group(dense, pp),
        dp=group(dense, dp),
        dp_cp=dp_cp,
        mp=group(dense, pp, tp),
        tp_cp=group(dense, cp, tp),
        tp_dp_cp=group(dense, dp, cp, tp),
        ep=group(experts, cp),
        expt_tp=group(experts, tp),
        expt_dp=expt_dp,
        tp_ep=group(experts, cp, tp),
        tp_ep_pp=group(experts, pp, cp, tp),
        embd=None if ends is None else dist.new_subgroups_by_enumeration(ends.tolist(), timeout=timeout)[0],
        pos_embd=None,
        # one instance of the distributed optimizer: gradient norms are summed over the world
        intra_dist_opt=group(dense, pp, dp, cp, tp),
        intra_dp_cp=dp_cp,
        intra_expt_dp=expt_dp,
    )
    return Groups(parallel, layout, layout.coordinates(dist.get_rank())[1], collection)


def world_size() -> int:
    """torchrun's ranks; once torch.distributed runs, those of this rank's world (parallel/split.py makes two)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_a_node() -> int:
    """As torchrun says; else the world is one machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def check_batch(train: TrainConfig, parallel: ParallelConfig, world: int) -> list[ConfigError]:
    """The global batch must be micro_batch_size x data-parallel ranks x a whole accumulation (x PP where the pipeline is interleaved).

    Any number of rows does with micro-batches by tokens: ranks that have none left get fillers.
    """
    if train.max_tokens_per_micro_batch is not None:
        return []
    dp = max(1, Layout.of(parallel, world).dp)
    unit, parts = train.micro_batch_size * dp, f"micro_batch_size {train.micro_batch_size} x dp {dp}"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        unit *= parallel.pipeline_model_parallel_size
        parts += f" x pp {parallel.pipeline_model_parallel_size} (interleaved)"
    if train.global_batch_size % unit:
        down = train.global_batch_size // unit * unit
        return [
            ConfigError(
                f"train.global_batch_size = {train.global_batch_size} is not a multiple of {parts} = {unit}",
                where="train.global_batch_size",
                expected=f"a multiple of {unit}",
                fix=f"--train.global_batch_size {down or unit}",
            )
        ]
    return []


def pad_multiple(parallel: ParallelConfig) -> int:
    """A row's tokens are cut by CP, and then by TP under sequence parallelism."""
    return parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def slice_multiple(parallel: ParallelConfig) -> int:
    """Micro-batches of a forward pass must be a multiple of this: the interleaved schedule goes round in groups of PP."""
    return 1 if parallel.virtual_pipeline_model_parallel_size is None else parallel.pipeline_model_parallel_size


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    return 1 if parallel.expert_model_parallel_size > 1 else parallel.tensor_model_parallel_size


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def initialize(parallel: ParallelConfig, *, seed: int) -> Layout:
    """Start torch.distributed and Megatron's groups (after `spec.check_layout`: here sizes are taken to divide)."""
    global _groups
    world, here = world_size(), device.current()
    timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
    if here.is_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            # vLLM's external_launcher reads these too
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
            # alone nothing may listen where other machines reach it, as torch's own store would
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(here.backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
            store = fresh_store(store, rank=rank, world=ranks, timeout=timeout)
            dist.init_process_group(here.backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    _groups = _make_groups(parallel)
    tp, ep, etp = (group.rank() for group in (_groups.collection.tp, _groups.collection.ep, _groups.collection.expt_tp))
    tensor_parallel.model_parallel_cuda_manual_seed(seed, tp_rank=tp, ep_rank=ep, etp_rank=etp)
    if world > 1 and "MASTER_ADDR" in os.environ:
        # nine tenths: before the collective's own time-out, which names nobody
        name = [uuid.uuid4().hex]  # the store may still have the signs and the verdict of an attempt that torchrun started before this one
        dist.broadcast_object_list(name, src=0)
        watch.start(attempt=name[0], silence_s=parallel.silence_seconds, behind_s=54 * parallel.timeout_minutes)
    return _groups.layout


def shutdown() -> None:
    """Leave the groups in order; a rank that exits earlier would make the others report a lost peer.

    vLLM's own end may have taken all groups along; the watching thread must end in any case: left in the store's C++ when Python
    ends, it would abort the process.
    """
    if dist.is_initialized():
        dist.barrier()
    watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def from_last_stage(value: Any, pp: dist.ProcessGroup) -> Any:
    """Collective over `pp`. A small Python object of the last pipeline stage, on every stage."""
    box = [value]
    if pp.size() > 1:
        dist.broadcast_object_list(box, group=pp, group_src=pp.size() - 1)
    return box[0]


def sum_over_data_parallel(x: torch.Tensor, of: Groups | None = None) -> torch.Tensor:
    """Collective. Sum of a CPU tensor over the data-parallel ranks (not the context-parallel ones) of the run's or other groups."""
    moved = x.to(device.current().name)
    dist.all_reduce(moved, group=(of or groups()).collection.dp)
    return moved.to(x.device)


def gather_from_data_parallel(value: Any) -> list[Any]:
    """Collective. The Python objects of all data-parallel ranks, in their order, on the first of each group; [] on the others."""
    dp = groups().collection.dp
    box: list[Any] = [None] * dp.size() if dp.rank() == 0 else []
    dist.gather_object(value, box or None, group=dp, group_dst=0)
    return box


def on_any_rank(flag: bool) -> bool:
    """True on every rank of the world where it is True on one."""
    found = torch.tensor(float(flag), device=device.current().name)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def from_all_ranks(values: list[Any]) -> list[Any]:
    """Small Python lists of all ranks of the world, one after another, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, values)
    return [value for part in box for value in part]
