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

from mrlhf.config.process import gpu_files, names_gpus
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


def driver_version(proc: Path = Path("/proc")) -> str:
    """NVIDIA's kernel driver, whether or not it works with this torch."""
    with contextlib.suppress(OSError, AttributeError):
        text = (proc / "driver/nvidia/version").read_text()
        return re.search(r"\b\d{3}\.\d+[\d.]*", text)[0]  # type: ignore[index]
    return "unknown"


def _unusable_gpu(what: str, reason: str, proc: Path = Path("/proc")) -> EnvironmentProblem:
    """reason: torch's own words, or nothing."""
    build = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}"
    what = f"{what}: driver {driver_version(proc)}, torch {torch.__version__} (for {build or 'the CPU only'}){reason}"
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
    if forced == "cuda":
        raise _unusable_gpu("MRLHF_DEVICE = cuda, and torch sees no GPU", _reason(caught))
    if files := gpu_files(rocm=bool(torch.version.hip)):
        raise _unusable_gpu(f"there is a GPU ({files[0]}), and torch cannot use it", _reason(caught))
    given = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")
    if names_gpus(given) and names_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", "0")):
        what = f"NVIDIA_VISIBLE_DEVICES = {given} gives this process a GPU, and there is no device file of one"
        raise _unusable_gpu(what, _reason(caught))
    return Device("cpu", "gloo")


def _reason(caught: list[warnings.WarningMessage]) -> str:
    """Why torch sees no GPU, in its own words. It warns once a process, which may have been before."""
    words = [str(w.message) for w in caught[:1]]
    if not words and (torch.version.cuda or torch.version.hip):
        try:
            torch.cuda.init()
        except Exception as error:  # RuntimeError, AssertionError, errors of the driver: the text is all that counts
            words = [str(error)]
    return "".join(f"; {' '.join(text.split())[:300]}" for text in words)


def take_gpu() -> None:
    """Makes this rank's GPU the current one, where there are any.

    Raises EnvironmentProblem on all ranks of a node that has fewer GPUs than ranks, and where torch has no kernels for
    the GPU. Before the first collective: the ranks with a GPU would wait for the others.
    """
    if not current().is_cuda:
        return
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    if ranks > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES = {visible})"
        raise EnvironmentProblem(f"{ranks} ranks on this node, and torch sees {gpus} GPU(s){limit}",
                                 expected="a GPU for each rank, and every rank sees all of them",
                                 fix=f"torchrun --nproc-per-node {gpus}")
    torch.cuda.set_device(rank)
    kernels = [(kind, int(version[:-1]), int(version[-1])) for kind, version in
               re.findall(r"\b(sm|compute)_(\d\d+)", " ".join(torch.cuda.get_arch_list()))]
    major, minor = torch.cuda.get_device_capability()
    if kernels and not any(
        (major == a and minor >= b) if kind == "sm" else (major, minor) >= (a, b) for kind, a, b in kernels
    ):
        built = ", ".join(sorted({f"{a}.{b}" for _, a, b in kernels}, key=float))
        what = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, "
        what += f"torch {torch.__version__} has kernels for {built}"
        raise EnvironmentProblem(what, expected="a build of torch for this GPU")
