"""What each process needs before it imports torch: environment variables, logging and room for open files; the exit
status of a user error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import warnings
from collections.abc import Iterator

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


def prepare_environment() -> None:
    """Sets what torch, tokenizers and Megatron read at import time, and logging; values the user has set are kept."""
    log.set_up()
    raise_file_limit()
    cuda = os.environ.get("MRLHF_DEVICE") != "cpu"
    cuda &= any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl"))
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
