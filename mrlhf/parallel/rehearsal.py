"""Rank r of a CUDA world of any size, on a machine without a GPU: the real program over fake tensors.

In a process with MRLHF_DEVICE=rehearsal from its start (mrlhf.parallel chooses the device when it is imported):

    with Rehearsal(rank=777, world=1024) as rehearsal:
        state.initialize(parallel, seed=1)
        with rehearsal.tracing("build"):
            trainer = Trainer(...)
        with rehearsal.tracing("step"):
            trainer.step(batches, loss)
    report = rehearsal.report()

Megatron, autograd, the optimizer, the reshard and the planning of a checkpoint execute as on a GPU: an operation that
mixes devices or dtypes raises, and so does a missing name. No number of a weight or a loss exists (meter.py says what a
program reads instead), and time does not either.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from mrlhf.errors import EnvironmentProblem
from mrlhf.parallel import device, fake_cuda, megatron, meter, state
from mrlhf.parallel.meter import Message

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Peak:
    """Most bytes that lived at once on the device. parts: of them by what `name_part` called it; the rest is "other".
    """

    nbytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Traffic:
    """Calls of a collective, and the bytes of their larger sides together."""

    calls: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """What one rank did. Keys begin with the phase that `Rehearsal.tracing` named."""

    rank: int
    world: int
    peaks: Mapping[str, Peak]
    flops: Mapping[str, int]
    collectives: Mapping[tuple[str, str, str], Traffic]  # (phase, operation, group)
    host_waits: Mapping[tuple[str, str], int]  # (phase, file:function)
    copies: Mapping[tuple[str, str], int]  # (phase, "cpu->cuda" or "cuda->cpu") -> bytes
    squares: Mapping[tuple[str, str], int]  # (phase, operation, shape and place) of what is square in the row length
    messages: tuple[Message, ...]

    def waits(self, phase: str, known: Mapping[str, str] | None = None) -> dict[str, int]:
        """The host's waits of a phase by place, without those of `known` (place -> reason)."""
        return {place: n for (of, place), n in self.host_waits.items() if of == phase and place not in (known or {})}


class Rehearsal:
    """A context: this process is `rank` of `world`, on machines of `local` GPUs. One at a time; many may follow.

    square: the length of a row; `report().squares` lists tensors with two dimensions of at least that length.
    kept: the share of True in masks whose values are not known.
    """

    def __init__(self, *, rank: int = 0, world: int = 1, local: int = 8, square: int | None = None,
                 kept: float = 1.0) -> None:
        if device.current().backend != "fake":
            raise EnvironmentProblem("a rehearsal in a process that has chosen another device",
                                     expected="MRLHF_DEVICE=rehearsal before mrlhf.parallel is imported")
        self.rank, self.world, self.local = rank, world, local
        self.meter = meter.Meter(square=square, kept=kept)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._names: dict[str, str] = {}  # torch's name of a group -> ours
        # the step's [sum, count], which the last pipeline stage tells the others
        self.from_last_stage: Callable[[], Any] = lambda: {"loss": torch.tensor([1.0, 1.0])}

    def __enter__(self) -> Rehearsal:
        self._environment = {name: os.environ.get(name) for name in _VARIABLES}
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # no store, so no watch thread
            os.environ.pop(name, None)
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK=str(self.rank % self.local),
                          LOCAL_WORLD_SIZE=str(min(self.local, self.world)))
        meter.set_current(self.meter)
        megatron.renew_gather_buffer()
        fake_cuda.start_world(self.rank, self.world)
        return self

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()
        meter.set_current(None)
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    @contextlib.contextmanager
    def tracing(self, phase: str) -> Iterator[meter.Meter]:
        """Tensors made inside are fake. Those from outside (batches) are host data with known values."""
        self.meter.enter_phase(phase)
        # backward on a thread of its own, as for a device, would leave the modes behind
        one_thread = torch.autograd.set_multithreading_enabled(False)
        with one_thread, self._other_stages(), fake_cuda.patched(), fake_cuda.Kernels(), self._fake, self.meter:
            yield self.meter

    @contextlib.contextmanager
    def _other_stages(self) -> Iterator[None]:
        """What the last pipeline stage, another process, tells the others."""
        with mock.patch.object(state, "from_last_stage", lambda value, pp: value or self.from_last_stage()):
            yield

    def name_parts(self, model: Any) -> None:
        """Counts the model's tensors by their kind, "weights", "optimizer" or "gradients", from now on."""
        for kind in ("weights", "gradients", "optimizer") if hasattr(model, "optimizer") else ("weights",):
            self.meter.name_part(kind, model.tensors(kind))

    def name_groups(self, groups: state.Groups) -> None:
        """Collectives are reported by the names of ProcessGroupCollection; those of the run's groups are known."""
        self._names |= {group.group_name: name for name, group in vars(groups.collection).items()
                        if isinstance(group, dist.ProcessGroup)}

    def report(self) -> Report:
        with contextlib.suppress(AssertionError):  # no groups yet
            self.name_groups(state.groups())
        m = self.meter
        calls: Counter[tuple[str, str, str]] = Counter()
        nbytes: Counter[tuple[str, str, str]] = Counter()
        for message in m.messages:
            everyone = "world" if len(message.ranks) == self.world else f"{len(message.ranks)} ranks"
            key = message.phase, message.op, self._names.get(message.group, everyone)
            calls[key] += 1
            nbytes[key] += message.nbytes
        peaks = {phase: Peak(total, {k: v for k, v in parts.items() if v}) for phase, (total, parts) in m.peaks.items()}
        traffic = {key: Traffic(count, nbytes[key]) for key, count in calls.items()}
        return Report(self.rank, self.world, peaks, dict(m.flops), traffic, dict(m.waits), dict(m.copies),
                      dict(m.squares), tuple(m.messages))


def unpaired(reports: Sequence[Report]) -> list[str]:
    """Where ranks that share a group would wait for each other for ever: reports of different ranks of one program.

    Two ranks of a group must call the same collectives on it, in one order and with equal bytes (an all-to-all: what
    one sends is what the other expects). A send from one to the other needs its receive, in order and of equal size.
    """
    problems = []
    for i, a in enumerate(reports):
        for b in reports[i + 1 :]:
            shared = {(m.group, m.ranks) for m in a.messages if b.rank in m.ranks}
            shared |= {(m.group, m.ranks) for m in b.messages if a.rank in m.ranks}
            for group in sorted(shared):
                problems += _unpaired_collectives(a, b, group)
                problems += _unpaired_sends(a, b, group) + _unpaired_sends(b, a, group)
    return problems


def _of_group(report: Report, group: tuple[str, tuple[int, ...]]) -> Iterable[Message]:
    return (m for m in report.messages if (m.group, m.ranks) == group)


def _mismatch(what: str, x: Sequence[Any], y: Sequence[Any], ranks: tuple[int, ...]) -> list[str]:
    at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
    if at == len(x) == len(y):
        return []
    one, other = ("nothing" if at >= len(some) else some[at] for some in (x, y))
    shown = f"{len(ranks)} ranks from {ranks[0]}"
    return [f"{what}, group of {shown}, call {at}: {one} against {other}"]


def _unpaired_collectives(a: Report, b: Report, group: tuple[str, tuple[int, ...]]) -> list[str]:
    ranks = group[1]
    at_a, at_b = ranks.index(a.rank), ranks.index(b.rank)

    def calls(report: Report, other: int, *, to_first: bool) -> list[tuple[str, Any]]:
        found_calls: list[tuple[str, Any]] = []
        for m in _of_group(report, group):
            if m.peer is None:
                pair = None if m.splits is None else (m.splits[0][other], m.splits[1][other])
                found_calls.append((m.op, m.nbytes if pair is None else pair[::-1] if to_first else pair))
        return found_calls

    return _mismatch(f"ranks {a.rank} and {b.rank}", calls(a, at_b, to_first=False), calls(b, at_a, to_first=True),
                     ranks)


def _unpaired_sends(a: Report, b: Report, group: tuple[str, tuple[int, ...]]) -> list[str]:
    sent = [m.nbytes for m in _of_group(a, group) if m.op == "send" and m.peer == b.rank]
    received = [m.nbytes for m in _of_group(b, group) if m.op.startswith("recv") and m.peer == a.rank]
    return _mismatch(f"sends of rank {a.rank} to rank {b.rank}", sent, received, group[1])
