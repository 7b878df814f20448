"""The phases of a run: one `with` informs the watch, the heartbeat and the memory tracker, and measures the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from mrlhf.errors import MrlhfError
from mrlhf.memory.tracker import Memory, phase_label
from mrlhf.observe import heartbeat
from mrlhf.parallel import watch


class Phases:
    """`with phase("gen", step): ...`, in the same order on all ranks. A step may enter a phase several times.

    Inside, the watch reports a hang with the phase (parallel/watch.py), RUN/heartbeat/ shows the phase, and running out
    of memory raises OutOfMemory with the peaks of all phases. `seconds` and `peaks` hold, by phase, its time in this
    step and its memory peak in GiB. before_end: called before an error leaves a phase that all ranks raise, as one rank
    alone always does; collective.
    """

    def __init__(self, memory: Memory, *, before_end: Callable[[], None] = lambda: None) -> None:
        self.memory, self._before_end = memory, before_end
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self.step_start = time.perf_counter()

    def start_step(self, step: int) -> None:
        """Clears the times and peaks of the step before. Until its first phase, the watch shows the step alone."""
        watch.set_phase(phase_label("step", step))
        self.seconds, self.peaks, self.step_start = {}, {}, time.perf_counter()
        self.memory.device_peak = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str, step: int | None = None) -> Iterator[None]:
        watch.set_phase(phase_label(name, step))
        start = time.perf_counter()
        try:
            with heartbeat.in_phase(name, step or 0), self.memory(name, step):
                yield
        except BaseException as error:
            if dist.get_world_size() == 1 or isinstance(error, MrlhfError) and error.on_all_ranks:
                self._before_end()
            raise
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0.0), self.memory.last_peak)

    def step_seconds(self) -> float:
        return time.perf_counter() - self.step_start

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """This rank's timing_s/*, and memory/<name>_gib and memory/peak_gib as maxima over the ranks. Collective."""
        names = [name for name in names if name in self.seconds]
        here = [*(self.peaks[name] for name in names), self.memory.device_peak]
        peaks = torch.tensor(here, dtype=torch.float64)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        times = {f"timing_s/{name}": self.seconds[name] for name in names} | {"timing_s/step": self.step_seconds()}
        *by_phase, on_device = peaks.tolist()
        memory = {f"memory/{name}_gib": x for name, x in zip(names, by_phase, strict=True)}
        memory |= {"memory/device_gib": on_device} if on_device else {}
        return times | memory | {"memory/peak_gib": max(by_phase)}
