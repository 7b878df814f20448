"""Where a run is: one `with` tells the watch, the heartbeat and the memory tracker, and measures the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from mrlhf.memory.tracker import Memory, phase_label
from mrlhf.observe import heartbeat
from mrlhf.parallel import device, watch


class Phases:
    """`with phase("rollout", step): ...`, in the same order on all ranks. A name may come several times in a step.

    Inside, a hang is reported with the phase (parallel/watch.py), RUN/heartbeat/ shows it, and out of memory becomes an
    OutOfMemory error with the peaks of all phases. Afterwards `seconds` and `peaks` hold its time and its memory peak
    in GiB.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self.step_start = time.perf_counter()

    def start_step(self, step: int) -> None:
        """Forget the times and peaks of the step before. Until its first phase, the watch knows the step alone."""
        watch.phase(phase_label("step", step))
        self.seconds, self.peaks, self.step_start = {}, {}, time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str, step: int | None = None) -> Iterator[None]:
        watch.phase(phase_label(name, step))
        start = time.perf_counter()
        with heartbeat.phase(name, step or 0), self.memory(name, step):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0.0), self.memory.last)

    def step_seconds(self) -> float:
        return time.perf_counter() - self.step_start

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """timing_s/<name>, timing_s/step, and memory/<name>_gib and memory/peak_gib of the fullest rank. Collective."""
        names = [name for name in names if name in self.seconds]
        peaks = torch.tensor([self.peaks[name] for name in names], dtype=torch.float64, device=device.current().name)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        times = {f"timing_s/{name}": self.seconds[name] for name in names} | {"timing_s/step": self.step_seconds()}
        memory = {f"memory/{name}_gib": float(x) for name, x in zip(names, peaks, strict=True)}
        return times | memory | {"memory/peak_gib": float(peaks.max())}
