"""The owner of the device's memory in PPO: whose turn it is, vLLM's or the trainer's. Nothing else moves a part.

In vLLM's turn it is awake, with the actor's weights, and every part of the trainer that `offload.*` names is on the
host. In the trainer's turn vLLM sleeps, and the parts that the phase uses are on the device. What vLLM sleeps with, its
weights and its cache, is lost: its next turn begins with the actor's weights. Without rollout.sleep, on a CPU and on
ranks of its own vLLM never sleeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from mrlhf.config.options import OffloadConfig
from mrlhf.memory.tracker import Memory
from mrlhf.parallel import device
from mrlhf.parallel.offload import Parking
from mrlhf.rl.rollout.remote import RemoteSampler
from mrlhf.rl.rollout.sampler import Sampler
from mrlhf.training.trainer import Model, Trainer

VLLM = TypeVar("VLLM", Sampler, RemoteSampler)


class Offload:
    """Keeps the tensors that `offload.*` names on the host, except in the phases that use them.

    trainers, frozen: models by role. Trainers are "actor" and "critic"; frozen models are "reference" and, under any
    other name, reward models. memory: learns what vLLM holds.
    """

    def __init__(self, config: OffloadConfig, *, trainers: Mapping[str, Trainer], frozen: Mapping[str, Model],
                 memory: Memory | None = None) -> None:
        self.trainers, self.memory, self.config = trainers, memory, config
        self._vllm: Sampler | RemoteSampler | None = None
        self.vllm_sleeps = False
        self.parked: dict[str, list[tuple[Parking, Trainer | Model, str]]] = {}
        for role, trainer in trainers.items():
            kinds = [kind for kind in ("optimizer", "gradients") if getattr(config, kind)]
            self.parked[role] = [(Parking(keep=kind == "optimizer"), trainer, kind) for kind in kinds]
        for role, model in frozen.items():
            on = config.reference if role == "reference" else config.reward
            self.parked[role] = [(Parking(), model, "weights")] if on else []

    # ------------------------------------------------------------------ vLLM's turn

    def start_vllm(self, make: Callable[[int], VLLM], *, sleeps: bool, update: int) -> VLLM:
        """vLLM, built beside a trainer that is parked, and asleep if it can be.

        make: gets the bytes that the trainer will need on the device in vLLM's turn and does not hold yet: Adam's
        moments, which the first step makes. Where vLLM never sleeps (not `sleeps`) also all that is parked, and
        `update` bytes for activations.
        """
        parked = self.park_all()
        moments = sum(t.moments_to_come() for t in self.trainers.values() if not (sleeps and self.config.optimizer))
        to_come = moments + (0 if sleeps else parked + update)
        vllm = self._vllm = make(to_come if device.current().is_cuda else 0)
        self._let_vllm_sleep()
        return vllm

    def write_weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Begins vLLM's turn with the actor's `parameters`. Collective. Returns `Sampler.write_weights`'s."""
        assert self._vllm is not None
        self.park_all()
        if self.memory is not None:
            self.memory.hide(0)
        result = self._vllm.write_weights(parameters)
        self.vllm_sleeps = False
        return result

    @contextlib.contextmanager
    def generating(self, write: Callable[[], object]) -> Iterator[None]:
        """vLLM's turn, which ends with this. write: calls `write_weights`; used if a trainer's turn came between."""
        if self.vllm_sleeps:
            write()
        self.park_all()
        yield
        self._let_vllm_sleep()

    def _let_vllm_sleep(self) -> None:
        if self._vllm is None or self.vllm_sleeps or not self._vllm.sleeps:
            return
        if self.memory is not None:
            self.memory.sample_device()
        freed = self._vllm.sleep()
        self.vllm_sleeps = True
        if self.memory is not None:
            self.memory.hide(freed)

    # ------------------------------------------------------------------ the trainer's turn

    @contextlib.contextmanager
    def using(self, *roles: str) -> Iterator[None]:
        """The trainer's turn: these roles are on the device inside the `with`. Ignores roles that a run lacks."""
        self._let_vllm_sleep()
        for role in roles:
            for parking, _, _ in self.parked.get(role, []):
                parking.fetch()
        yield
        self._park(role for role in roles if role in self.parked)

    def _park(self, roles: Iterable[str]) -> int:
        freed = 0
        for role in roles:
            for parking, model, kind in self.parked[role]:
                if not parking.is_away:
                    freed += parking.park(model.tensors(kind))
        return freed

    def park_all(self) -> int:
        """Moves every role to the host and returns the bytes freed. Tensors on the host already stay there."""
        return self._park(self.parked)
