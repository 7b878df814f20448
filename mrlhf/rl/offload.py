"""Moves models, gradients and optimizer state to the host in the phases of a PPO step that do not use them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch

from mrlhf.config.options import OffloadConfig
from mrlhf.parallel import device
from mrlhf.parallel.offload import Parking
from mrlhf.training.trainer import Model, Trainer


class Offload:
    """Keeps the tensors that `offload.*` names on the host, except in the phases that use them.

    trainers, frozen: models by role. Trainers are "actor" and "critic"; frozen models are "reference" and, under any
    other name, reward models.
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
        """Moves every role to the host. Tensors on the host already stay there."""
        self._park(self.parked)
        if device.current().is_cuda and any(self.parked.values()):
            torch.cuda.empty_cache()  # vLLM allocates outside of torch's cache

    def fetch(self, *roles: str) -> None:
        """Brings these roles to the device until the next `park_all`. Ignores roles that this run does not have."""
        for role in roles:
            for parking, _, _ in self.parked.get(role, []):
                parking.fetch()

    @contextlib.contextmanager
    def using(self, *roles: str) -> Iterator[None]:
        """These roles are on the device inside the `with`."""
        self.fetch(*roles)
        yield
        self._park(role for role in roles if role in self.parked)
