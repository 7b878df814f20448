"""What each process needs before it imports torch: environment variables and logging; the exit status of a user
error.
"""

from __future__ import annotations

import os
import warnings

from mrlhf.observe import log

USER_ERROR = 2


def torchrun_rank() -> int:
    """This process's rank of torchrun's; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def prepare_environment() -> None:
    """Sets what torch, tokenizers and Megatron read at import time, and logging; values the user has set are kept."""
    log.set_up()
    cuda = any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl"))
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
