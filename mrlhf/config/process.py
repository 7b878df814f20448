"""What each process needs before it imports torch: environment variables, logging and room for open files; the exit
status of a user error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

from mrlhf.errors import EnvironmentProblem
from mrlhf.observe import log

USER_ERROR = 2
_MOST_FILES = 1 << 16  # enough; some programs close every possible descriptor, which takes long under a higher limit


def torchrun_rank() -> int:
    """This process's rank of torchrun's; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def raise_file_limit() -> None:
    """Raises the limit on open files, which is often 1,024, as far as the system lets a user raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def naming_file_limit() -> Iterator[None]:
    """Raises EnvironmentProblem with the limit where its block cannot open one file more."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise EnvironmentProblem(f"too many open files: the limit of this process is {soft:,}", where=error.filename,
                                 expected=f"a higher hard limit than {hard:,} (ulimit -Hn)",
                                 fix="raise it in limits.conf, LimitNOFILE= or --ulimit nofile=65536") from error


def names_gpus(value: str) -> bool:
    """Whether a list of visible devices begins with one: CUDA sees the devices before the first entry that names none.
    """
    return re.match(r"\s*(\d|GPU-|MIG-)", value) is not None


def gpu_files(dev: Path = Path("/dev"), wsl: Path = Path("/usr/lib/wsl/lib"), *, rocm: bool = False) -> list[Path]:
    """The device files of GPUs that this process was not told to leave alone. They exist without a working driver.

    rocm: AMD's too. NVIDIA_VISIBLE_DEVICES = all says nothing: CUDA's container images set it where there is no GPU.
    """
    lists = ("CUDA_VISIBLE_DEVICES", *(("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if rocm else ()))
    if not all(names_gpus(os.environ.get(name, "0")) for name in lists):
        return []
    if os.environ.get("NVIDIA_VISIBLE_DEVICES") in ("void", "none", "") and not rocm:
        return []
    patterns = ["nvidia[0-9]*", *(("kfd",) if rocm else ())]
    if (wsl / "libcuda.so.1").exists():  # Windows' subsystem for Linux has dxg with a GPU of any maker
        patterns.append("dxg")
    return sorted(file for pattern in patterns for file in dev.glob(pattern))


def prepare_environment() -> None:
    """Sets what torch, tokenizers and Megatron read at import time, and logging; values the user has set are kept."""
    log.set_up()
    raise_file_limit()
    cuda = os.environ.get("MRLHF_DEVICE") != "cpu" and bool(gpu_files())
    wanted = {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        wanted["OMP_NUM_THREADS"] = "1"
    # One hardware queue keeps Megatron's tensor-parallel communication ahead of the matmul it overlaps with.
    # Without CUDA, compiling a fused kernel costs a C++ build a process and gains nothing on toy sizes.
    wanted |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if cuda else {"TORCH_COMPILE_DISABLE": "1"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)(\.|$)")
