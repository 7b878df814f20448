"""CUDA with NCCL where there is a GPU, CPU with gloo otherwise: the choice is made once, here."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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

    @property
    def world_backend(self) -> str:
        """For groups that also exchange Python objects and small host tensors: these go over gloo, beside the device's
        messages, and nobody waits for the device."""
        return f"cpu:gloo,cuda:{self.backend}" if self.is_cuda and self.backend != "fake" else self.backend

    def summary(self) -> str:
        """One line for the start of a run."""
        versions = f"torch {torch.__version__}, megatron-core {version('megatron-core')}"
        if self.is_cuda:
            return f"{torch.cuda.get_device_name()} (NCCL), {versions}"
        return f"CPU, {torch.get_num_threads()} threads a rank (gloo), {versions}"


def make_deterministic() -> None:
    """Before the first group, kernel and import of vLLM. A variable that the user has set stays as it is.

    torch raises at an operation that has no deterministic form. Its attention kernels and Megatron's embedding follow
    torch's switch.
    """
    if current().is_cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")  # of several, NCCL takes one by its measurements
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it
    torch.backends.cudnn.benchmark = False


def gpu_files(dev: Path = Path("/dev"), wsl: Path = Path("/usr/lib/wsl/lib")) -> list[Path]:
    """The device files of GPUs that this process was not told to leave alone. They exist without a working driver.

    NVIDIA_VISIBLE_DEVICES alone says nothing: CUDA's container images set it also where there is no GPU.
    """
    # CUDA sees the devices before the first entry that names none
    none_named = not re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    if none_named or os.environ.get("NVIDIA_VISIBLE_DEVICES") in ("void", "none", ""):
        return []
    patterns = ["nvidia[0-9]*", *(("kfd",) if torch.version.hip else ())]
    if (wsl / "libcuda.so.1").exists():  # Windows' subsystem for Linux has dxg with a GPU of any maker
        patterns.append("dxg")
    return sorted(file for pattern in patterns for file in dev.glob(pattern))


def _unusable_gpu(what: str, reason: str, proc: Path = Path("/proc")) -> EnvironmentProblem:
    """reason: torch's own words, or nothing."""
    build = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}"
    driver = "unknown"
    with contextlib.suppress(OSError, AttributeError):
        text = (proc / "driver/nvidia/version").read_text()
        driver = re.search(r"\b\d{3}\.\d+[\d.]*", text)[0]  # type: ignore[index]
    what = f"{what}: driver {driver}, torch {torch.__version__} (for {build or 'the CPU only'}){reason}"
    if build is None:
        expected = "a build of torch for the GPU"
    else:
        expected = f"a driver for {build} or newer, or a build of torch for this driver"
    return EnvironmentProblem(what, expected=expected, fix="that, or MRLHF_DEVICE=cpu to insist on the CPU")


@functools.lru_cache(maxsize=1)
def current() -> Device:
    """The device of this process: CUDA where torch can use it, else the CPU. `MRLHF_DEVICE` insists on one of them.

    rehearsal: a CUDA device that does not exist (parallel/rehearsal.py).

    Raises EnvironmentProblem where a GPU is there that torch cannot use: a run would take the CPU without a word.
    """
    forced = os.environ.get("MRLHF_DEVICE", "")
    if forced not in ("", "cpu", "cuda", "rehearsal"):
        raise EnvironmentProblem(f"MRLHF_DEVICE = {forced!r}", expected="cpu or cuda")
    if forced == "rehearsal":
        from mrlhf.parallel import fake_cuda

        fake_cuda.install()
        return Device("cuda", "fake")
    if forced == "cpu":
        return Device("cpu", "gloo")
    with warnings.catch_warnings(record=True) as caught:  # torch warns of an old driver
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return Device("cuda", "nccl")
    reason = "".join(f"; {' '.join(str(w.message).split())[:300]}" for w in caught[:1])
    if forced == "cuda":
        raise _unusable_gpu("MRLHF_DEVICE = cuda, and torch sees no GPU", reason)
    if files := gpu_files():
        raise _unusable_gpu(f"there is a GPU ({files[0]}), and torch cannot use it", reason)
    return Device("cpu", "gloo")
