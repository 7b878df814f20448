"""Process groups: torchrun's world cut into tensor-, context-, data- and pipeline-parallel groups by Megatron.

Rank order is Megatron's "tp-cp-dp-pp": rank = tp + TP * (cp + CP * (dp + DP * pp)). A plain process without torchrun is a
world of one.

With experts the TP x CP x DP ranks of a stage share them: EP > 1 gives each rank whole experts, num / EP of them, and EP = 1
cuts every expert by TP. (EP = 1 with whole experts on every rank would reduce their gradients over the wrong group.)
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

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


# Megatron keeps the groups of a layout in globals of its own, one layout at a time.
_GLOBALS = tuple(name for name in vars(parallel_state) if name.startswith("_") and name.isupper())
_NO_GROUPS = {name: getattr(parallel_state, name) for name in _GLOBALS}


class Groups:
    """Megatron's groups for one layout; they are in force from `initialize` on, or while `in_force` lasts."""

    def __init__(self, parallel: ParallelConfig) -> None:
        """Those that Megatron has now, which were made for `parallel`."""
        self.parallel, self.layout = parallel, Layout.of(parallel, dist.get_world_size())
        _, self.dp_rank, _ = self.layout.coordinates(dist.get_rank())
        self._globals = {name: getattr(parallel_state, name) for name in _GLOBALS}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        global _current
        before = _current
        if before is self:
            yield
            return
        try:
            self._put()
            yield
        finally:
            if before is not None:
                before._put()

    def _put(self) -> None:
        global _current
        vars(parallel_state).update(self._globals)
        _current = self


_current: Groups | None = None


class HasGroups:
    groups: Groups


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Object = TypeVar("_Object", bound=HasGroups)


def in_own_groups(method: Callable[Concatenate[_Object, _Arguments], _Result]) -> Callable[Concatenate[_Object, _Arguments], _Result]:
    """A method that runs with its object's `groups` in force."""

    @wraps(method)
    def wrapped(self: _Object, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with self.groups.in_force():
            return method(self, *args, **kwargs)

    return wrapped


def groups() -> Groups:
    """Those in force."""
    assert _current is not None
    return _current


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
    world = world_size()
    here = device.current()
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
    made = _make_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if world > 1 and "MASTER_ADDR" in os.environ:
        # nine tenths: before the collective's own time-out, which names nobody
        name = [uuid.uuid4().hex]  # the store may still have the signs and the verdict of an attempt that torchrun started before this one
        dist.broadcast_object_list(name, src=0)
        watch.start(attempt=name[0], silence_s=parallel.silence_seconds, behind_s=54 * parallel.timeout_minutes)
    return made.layout


def _make_groups(parallel: ParallelConfig) -> Groups:
    global _current
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size(parallel),
        distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
    )
    _current = Groups(parallel)
    return _current


def more_groups(parallel: ParallelConfig) -> Groups:
    """Collective. Those of another layout of the same ranks, beside the ones in force, which stay so; for a layout like theirs they themselves."""
    now = groups()
    if parallel == now.parallel:
        return now
    vars(parallel_state).update(_NO_GROUPS)
    try:
        return _make_groups(parallel)
    finally:
        now._put()


def shutdown() -> None:
    """Leave the groups in order; a rank that exits earlier would make the others report a lost peer.

    vLLM's own end may have taken all groups along; the watching thread must end in any case: left in the store's C++ when Python
    ends, it would abort the process.
    """
    if dist.is_initialized():
        dist.barrier()
    watch.stop()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def from_last_stage(value: Any) -> Any:
    """A small Python object of the last pipeline stage, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(
        box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=parallel_state.get_pipeline_model_parallel_group()
    )
    return box[0]


def sum_over_data_parallel(x: torch.Tensor) -> torch.Tensor:
    """Sum of a CPU tensor over the data-parallel ranks (not the context-parallel ones), on every rank."""
    moved = x.to(device.current().name)
    dist.all_reduce(moved, group=parallel_state.get_data_parallel_group())
    return moved.to(x.device)


def gather_from_data_parallel(value: Any) -> list[Any]:
    """The Python objects of all data-parallel ranks, in their order, on the first of each group; [] on the others."""
    group = parallel_state.get_data_parallel_group()
    box: list[Any] = [None] * group.size() if group.rank() == 0 else []
    dist.gather_object(value, box or None, group=group, group_dst=0)
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
