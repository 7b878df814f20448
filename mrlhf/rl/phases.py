"""The phases of a PPO step: how long each took, how much memory it had, and what the device need not hold meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from mrlhf.config.options import OffloadConfig
from mrlhf.memory.tracker import Memory
from mrlhf.parallel import device, watch
from mrlhf.parallel.offload import Parking
from mrlhf.training.trainer import Model, Trainer


class Phases:
    """`with phases("gen"): ...`, alike on all ranks; a name may come several times."""

    def __init__(self, step: int, memory: Memory) -> None:
        self.step, self._memory, self.start = step, memory, time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        watch.phase(f"{name} of step {self.step}")
        start = time.perf_counter()
        with self._memory(name, self.step):
            yield
        self.seconds[f"timing_s/{name}"] = self.seconds.get(f"timing_s/{name}", 0.0) + time.perf_counter() - start
        self._peaks[name] = max(self._peaks.get(name, 0.0), self._memory.last)

    def times(self) -> dict[str, float]:
        return self.seconds | {"timing_s/step": time.perf_counter() - self.start}

    def memory(self) -> dict[str, float]:
        """memory/<phase>_gib of the fullest rank, and the largest of them. Collective."""
        peaks = torch.tensor(list(self._peaks.values()), dtype=torch.float64, device=device.current().name)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        return {f"memory/{name}_gib": float(x) for name, x in zip(self._peaks, peaks, strict=True)} | {
            "memory/peak_gib": float(peaks.max())
        }


class Offload:
    """Keeps on the host what `offload` names, but for the phases that use it.

    trainers and frozen: by role (actor, critic; reference, and reward models under any other name).
    """

    def __init__(self, config: OffloadConfig, *, trainers: Mapping[str, Trainer], frozen: Mapping[str, Model]) -> None:
        self.parked: dict[str, list[tuple[Parking, Trainer | Model, str]]] = {}
        for role, trainer in trainers.items():
            kinds = [kind for kind in ("optimizer", "gradients") if getattr(config, kind)]
            self.parked[role] = [(Parking(keep=kind == "optimizer"), trainer, kind) for kind in kinds]
        for role, model in frozen.items():
            on = config.reference if role == "reference" else config.reward
            self.parked[role] = [(Parking(), model, "weights")] if on else []

    def _park(self, roles: Iterable[str]) -> None:
        for role in roles:
            for parking, model, kind in self.parked[role]:
                if not parking.is_away:
                    parking.park(model.tensors(kind))

    def park_all(self) -> None:
        """Before the first step; what is away already stays there."""
        self._park(self.parked)
        if device.current().is_cuda and any(self.parked.values()):
            torch.cuda.empty_cache()  # for vLLM, whose memory is outside of torch's cache

    def fetch(self, *roles: str) -> None:
        """These are on the device until the next `park_all`; roles that do not exist in this run need nothing."""
        for role in roles:
            for parking, _, _ in self.parked.get(role, []):
                parking.fetch()

    @contextlib.contextmanager
    def using(self, *roles: str) -> Iterator[None]:
        """These are on the device inside."""
        self.fetch(*roles)
        yield
        self._park(role for role in roles if role in self.parked)
