"""CUDA with NCCL where there is a GPU, CPU with gloo otherwise: the choice is made once, here."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib.metadata import version

import torch

from mrlhf.errors import EnvironmentProblem


@dataclass(frozen=True)
class Device:
    """`name` for torch tensors and `backend` for torch.distributed."""

    name: str
    backend: str

    @functools.cached_property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    def summary(self) -> str:
        """One line for the start of a run."""
        versions = f"torch {torch.__version__}, megatron-core {version('megatron-core')}"
        if self.is_cuda:
            return f"{torch.cuda.get_device_name()} (NCCL), {versions}"
        return f"CPU, {torch.get_num_threads()} threads a rank (gloo), {versions}"


@functools.lru_cache(maxsize=1)
def current() -> Device:
    """The device of this process. `MRLHF_DEVICE=cpu` forces the CPU on a machine with a GPU."""
    forced = os.environ.get("MRLHF_DEVICE", "")
    if forced not in ("", "cpu", "cuda"):
        raise EnvironmentProblem(f"MRLHF_DEVICE = {forced!r}", expected="cpu or cuda")
    if forced == "cuda" and not torch.cuda.is_available():
        fix = "install a CUDA build of torch, or unset MRLHF_DEVICE"
        raise EnvironmentProblem("MRLHF_DEVICE = cuda, and torch sees no GPU", fix=fix)
    return Device("cuda", "nccl") if torch.cuda.is_available() and forced != "cpu" else Device("cpu", "gloo")
