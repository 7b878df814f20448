"""What the device need not hold in every phase of a PPO step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch

from mrlhf.config.options import OffloadConfig
from mrlhf.parallel import device
from mrlhf.parallel.offload import Parking
from mrlhf.training.trainer import Model, Trainer


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
