"""Splits torchrun's ranks into two worlds, training ranks and generating ranks, with a bridge between them.

Megatron and vLLM both take torch.distributed's default group for the whole world. So each side gets its own default
group, on the same rendezvous under another prefix. The bridge adds two groups of all ranks, used for messages between
two ranks only.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.errors import EnvironmentProblem
from mrlhf.parallel import device, watch
from mrlhf.parallel.rendezvous import fresh_store

_FOR_EVER = timedelta(days=365)
Sending = list[tuple[Any, torch.Tensor]]  # works to wait for, and what must stay in memory until then


@dataclass(frozen=True)
class Bridge:
    """Ranks 0 .. trainers - 1 of torchrun's world train, the others generate. rank and world: torchrun's."""

    rank: int
    world: int
    trainers: int
    store: dist.Store
    timeout: timedelta
    control: Any  # gloo group for host memory, without a time-out
    weights: Any  # group of the device's backend, with the time-out

    @property
    def trains(self) -> bool:
        return self.rank < self.trainers

    @property
    def generators(self) -> range:
        return range(self.trainers, self.world)

    def start_messages(self, operations: Sequence[tuple[bool, torch.Tensor, int]]) -> list[Any]:
        """Starts one bucket: (is_send, tensor, torchrun's rank of the other side). Returns works to wait for."""

        def start() -> list[Any]:
            send, receive = self.weights.send, self.weights.recv
            return [(send if is_send else receive)([data], other, 0) for is_send, data, other in operations]

        if not device.current().is_cuda:
            return start()
        self.weights._start_coalescing()  # as in torch's batch_isend_irecv
        start()
        return [self.weights._end_coalescing()]

    def send(self, data: bytes, to: int) -> Sending:
        """Starts sending `data` to a rank and returns without waiting."""
        parts = torch.tensor([len(data)]), torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [(self.control.send([part], to, 0), part) for part in parts]

    def receive(self, source: int) -> bytes:
        """The next message of rank `source`. Generating ranks wait as long as training takes.

        Raises EnvironmentProblem if the other rank has gone, or does not answer a trainer within nine tenths of the
        time-out. That is before the collectives time out in which the other trainers wait; their errors name no rank.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self._receive(length, source)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._receive(data, source)
        return data.numpy().tobytes()

    def _receive(self, data: torch.Tensor, source: int) -> None:
        try:
            self.control.recv([data], source, 0).wait(0.9 * self.timeout if self.trains else _FOR_EVER)
        except RuntimeError as error:
            side = "trains" if source < self.trainers else "generates"
            raise EnvironmentProblem(
                f"rank {source}, which {side}, has gone or does not answer ({str(error).splitlines()[0]})",
                expected=f"an answer within parallel.timeout_minutes ({self.timeout}), a rollout's generation included",
                fix="look at that rank's own error; the same command resumes from the last checkpoint",
            ) from error


def wait_for(sending: Sending) -> None:
    for work, _ in sending:
        work.wait()


def split_world(generators: int, *, timeout_minutes: float, silence_s: float) -> Bridge:
    """Collective. Starts torch.distributed on every rank of torchrun; the last `generators` ranks generate."""
    timeout, here = timedelta(minutes=timeout_minutes), device.current()
    device.take_gpu()
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = fresh_store(store, rank=rank, world=world, timeout=timeout)
    trainers = world - generators
    side, own_rank, own_size = "trains", rank, trainers
    if rank >= trainers:
        side, own_rank, own_size = "generates", rank - trainers, generators
    own_store = dist.PrefixStore(side, store)
    dist.init_process_group(here.world_backend, store=own_store, rank=own_rank, world_size=own_size, timeout=timeout)
    if rank == 0:
        store.set("watch", uuid.uuid4().hex)
    attempt = store.get("watch").decode()
    watch.start_watch(attempt=attempt, silence_s=silence_s, behind_s=54 * timeout_minutes, rank=rank, world=world,
                      side=side)
    control = dist.ProcessGroupGloo(dist.PrefixStore("control", store), rank, world, _FOR_EVER)
    group = dist.ProcessGroupNCCL if here.is_cuda else dist.ProcessGroupGloo
    weights = group(dist.PrefixStore("weights", store), rank, world, timeout)
    if here.is_cuda:  # all ranks create NCCL's communicator together; later messages involve two
        weights.allreduce([torch.zeros(1, device=here.name)]).wait()
    return Bridge(rank, world, trainers, dist.PrefixStore("run", store), timeout, control, weights)
