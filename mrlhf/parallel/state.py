"""Process groups: torchrun's world cut into tensor-, context-, data- and pipeline-parallel groups, as Megatron takes
them.

Rank order is Megatron's "tp-cp-dp-pp": rank = tp + TP * (cp + CP * (dp + DP * pp)). A process without torchrun is a
world of one rank.

The TP x CP x DP ranks of a stage share the experts of its layers: with EP > 1 each rank has num / EP whole experts,
with EP = 1 every expert is sharded over TP. (With EP = 1 and whole experts on every rank, Megatron would reduce their
gradients over the wrong group.)
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
from mrlhf.config.process import torchrun_rank
from mrlhf.errors import ConfigError
from mrlhf.parallel import device, watch
from mrlhf.parallel.rendezvous import fresh_store


@dataclass(frozen=True)
class Layout:
    """The size of each parallel dimension, and how pipeline stages divide the layers."""

    world: int
    tp: int
    pp: int
    ep: int = 1
    cp: int = 1
    virtual_stages: int = 1  # on each pipeline rank
    first_layers: int | None = None  # layers of the first pipeline stage, if it differs from the others
    last_layers: int | None = None  # the same for the last one

    @staticmethod
    def from_config(parallel: ParallelConfig, world: int) -> Layout:
        return Layout(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size,
                      parallel.expert_model_parallel_size, parallel.context_parallel_size,
                      parallel.interleaved_chunks or 1, parallel.num_layers_in_first_pipeline_stage,
                      parallel.num_layers_in_last_pipeline_stage)

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tp * self.cp * self.pp

    @property
    def dp(self) -> int:
        return self.world // self.ranks_per_replica

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) of a rank."""
        return rank % self.tp, rank // (self.tp * self.cp) % self.dp, rank // (self.tp * self.cp * self.dp)

    def stage_of_layers(self, num_layers: int) -> list[int]:
        """The pipeline rank of every layer: one round over the ranks for each virtual stage of an interleaved pipeline.
        """
        ends = [n for n in (self.first_layers, self.last_layers) if n is not None]
        layers = [(num_layers - sum(ends)) // max(1, self.pp - len(ends))] * self.pp
        layers[0] = layers[0] if self.first_layers is None else self.first_layers
        layers[-1] = layers[-1] if self.last_layers is None else self.last_layers
        virtual = self.virtual_stages
        return [rank for _ in range(virtual) for rank in range(self.pp) for _ in range(layers[rank] // virtual)]

    def expert_rank(self, rank: int) -> int:
        """Which of the EP expert shards a rank holds."""
        return rank % (self.tp * self.cp * self.dp) % self.ep

    def batch_summary(self, train: TrainConfig) -> str:
        """How a step's global batch divides over ranks and micro-batches."""
        accumulation = train.global_batch_size // (train.micro_batch_size * self.dp)
        parts = f"micro {train.micro_batch_size} x accumulation {accumulation}"
        if train.max_tokens_per_micro_batch is not None:
            parts = f"micro-batches of up to {train.max_tokens_per_micro_batch:,} tokens"
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        experts = f", experts over {self.ep}" if self.ep > 1 else ""
        return (f"global {train.global_batch_size} = {parts} x dp {self.dp}   "
                f"({self.world} ranks = tp {self.tp} x pp {self.pp}{context} x dp {self.dp}{experts})")


@dataclass(frozen=True)
class Groups:
    """The process groups of one layout, as Megatron's constructors and functions take them."""

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
    """Collective. Groups of another layout of the same ranks, beside the run's own; for the run's layout its own."""
    return groups() if parallel == groups().parallel else _make_groups(parallel)


def group_ranks(layout: Layout, expert_tp: int) -> dict[str, list[list[int]]]:
    """The ranks of all groups, by ProcessGroupCollection's names. expert_tp: ranks that share an expert."""
    pp, dp, cp, tp = range(4)
    ranks, ep = torch.arange(layout.world), cp  # in the second grid EP has CP's place
    dense = ranks.view(layout.pp, layout.dp, layout.cp, layout.tp)
    experts = ranks.view(layout.pp, -1, layout.ep, expert_tp)

    def along(grid: torch.Tensor, *dims: int) -> list[list[int]]:
        others = [dim for dim in range(4) if dim not in dims]
        return grid.permute(*others, *dims).reshape(-1, math.prod(grid.shape[dim] for dim in dims)).tolist()

    return {
        "tp": along(dense, tp),
        "cp": along(dense, cp),
        "pp": along(dense, pp),
        "dp": along(dense, dp),
        "dp_cp": along(dense, dp, cp),
        "mp": along(dense, pp, tp),
        "tp_cp": along(dense, cp, tp),
        "tp_dp_cp": along(dense, dp, cp, tp),
        "ep": along(experts, ep),
        "expt_tp": along(experts, tp),
        "expt_dp": along(experts, dp),
        "tp_ep": along(experts, ep, tp),
        "tp_ep_pp": along(experts, pp, ep, tp),
        # The first and the last stage share a tied embedding. Ranks between them have no such group.
        "embd": dense[[0, -1]].flatten(1).t().tolist() if layout.pp > 1 else [],
        # one instance of the distributed optimizer, so gradient norms are summed over the world
        "intra_dist_opt": along(dense, pp, dp, cp, tp),
    }


def _make_groups(parallel: ParallelConfig) -> Groups:
    layout = Layout.from_config(parallel, dist.get_world_size())
    timeout = datetime.timedelta(minutes=max(1, round(parallel.timeout_minutes)))
    here, groups = device.current(), dict[str, dist.ProcessGroup | None]()
    for name, ranks in group_ranks(layout, expert_tensor_parallel_size(parallel)).items():
        backend = here.world_backend if name in ("pp", "dp") else here.backend  # gloo costs a socket for each pair
        made = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, backend=backend)[0] if ranks else None
        groups[name] = made
    within_instance = {"intra_dp_cp": groups["dp_cp"], "intra_expt_dp": groups["expt_dp"]}
    collection = ProcessGroupCollection(**groups, **within_instance, pos_embd=None)
    return Groups(parallel, layout, layout.coordinates(dist.get_rank())[1], collection)


def world_size() -> int:
    """Number of torchrun's ranks; once torch.distributed runs, of this rank's world (parallel/split.py makes two)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_a_node() -> int:
    """torchrun's ranks a node; without torchrun the world is one node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    return torchrun_rank() == 0


def check_batch(train: TrainConfig, parallel: ParallelConfig, world: int, *, answers: int = 0) -> list[ConfigError]:
    """The global batch must be a multiple of micro_batch_size x data-parallel ranks (x PP for an interleaved pipeline).

    Micro-batches by tokens allow any number of rows: ranks that run out of rows get fillers.
    answers: of a rollout (ppo), which the global batch must divide.
    """
    if train.max_tokens_per_micro_batch is not None:
        return []
    dp = max(1, Layout.from_config(parallel, world).dp)
    unit, parts = train.micro_batch_size * dp, f"micro_batch_size {train.micro_batch_size} x dp {dp}"
    if parallel.interleaved_chunks is not None:
        unit *= parallel.pipeline_model_parallel_size
        parts += f" x pp {parallel.pipeline_model_parallel_size} (interleaved)"
    if train.global_batch_size % unit:
        what = f"train.global_batch_size = {train.global_batch_size} is not a multiple of {parts} = {unit}"
        lower = range(train.global_batch_size // unit * unit, 0, -unit)
        size = next((n for n in (*lower, unit) if answers % n == 0), None)
        fix = None if size is None else f"--train.global_batch_size {size}"
        return [ConfigError(what, where="train.global_batch_size", expected=f"a multiple of {unit}", fix=fix)]
    return []


def pad_multiple(parallel: ParallelConfig) -> int:
    """Row lengths must be a multiple of this: CP cuts a row's tokens, and sequence parallelism cuts them again by TP.
    """
    return parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def slice_multiple(parallel: ParallelConfig) -> int:
    """The number of micro-batches must be a multiple of this: the interleaved schedule takes them in groups of PP."""
    return 1 if parallel.interleaved_chunks is None else parallel.pipeline_model_parallel_size


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    return 1 if parallel.expert_model_parallel_size > 1 else parallel.tensor_model_parallel_size


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def initialize(parallel: ParallelConfig, *, seed: int) -> Layout:
    """Collective. Starts torch.distributed, the run's groups, Megatron's random generators and the watch thread.

    Expects sizes that divide the world (models/families/spec.py `check_layout`).
    """
    global _groups
    world, here = world_size(), device.current()
    timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
    device.take_gpu()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            # vLLM's external_launcher reads these too
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
            # A single process must not listen on the network, as torch's own store would.
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(here.world_backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
            store = fresh_store(store, rank=rank, world=ranks, timeout=timeout)
            dist.init_process_group(here.world_backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    _groups = _make_groups(parallel)
    tp, ep, etp = (group.rank() for group in (_groups.collection.tp, _groups.collection.ep, _groups.collection.expt_tp))
    tensor_parallel.model_parallel_cuda_manual_seed(seed, tp_rank=tp, ep_rank=ep, etp_rank=etp)
    if world > 1 and "MASTER_ADDR" in os.environ:
        # A new name: the store may still have the keys of an earlier attempt.
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        # 54 s a minute: before the collective's own time-out, whose error names no rank
        watch.start_watch(attempt=name[0], silence_s=parallel.silence_seconds, behind_s=54 * parallel.timeout_minutes)
    return _groups.layout


def shutdown() -> None:
    """Collective. Destroys the groups together; a rank that exits earlier would make the others report a lost peer.

    vLLM's shutdown may already have destroyed all groups. The watch thread must end in any case: if it is in the
    store's C++ code when Python exits, it aborts the process.
    """
    if dist.is_initialized():
        dist.barrier()
    watch.stop_watch()
    if dist.is_initialized():
        dist.destroy_process_group()


def from_last_stage(value: Any, pp: dist.ProcessGroup) -> Any:
    """Collective over `pp`. A small Python object of the last pipeline stage, on every stage."""
    box = [value]
    if pp.size() > 1:
        dist.broadcast_object_list(box, group=pp, group_src=pp.size() - 1)
    return box[0]


def sum_over_data_parallel(x: torch.Tensor, of: Groups | None = None) -> torch.Tensor:
    """Collective. Sum of a CPU tensor over data-parallel ranks (without context-parallel ones)."""
    moved = x.to(device.current().name)
    dist.all_reduce(moved, group=(of or groups()).collection.dp)
    return moved.to(x.device)


def gather_from_data_parallel(value: Any) -> list[Any]:
    """Collective. The objects of all data-parallel ranks in order, on the first of each group; else []."""
    dp = groups().collection.dp
    box: list[Any] = [None] * dp.size() if dp.rank() == 0 else []
    dist.gather_object(value, box or None, group=dp, group_dst=0)
    return box


def on_any_rank(flag: bool) -> bool:
    """Collective. True on every rank of the world if `flag` is true on one."""
    any_flag = torch.tensor(float(flag))  # on the host, so over gloo
    dist.all_reduce(any_flag, op=dist.ReduceOp.MAX)
    return bool(any_flag)


def from_all_ranks(values: list[Any]) -> list[Any]:
    """Collective. The small Python lists of all ranks of the world as one list, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, values)
    return [value for part in box for value in part]
