"""Each test function of this folder runs on the CPU in `make test`, small, and on a GPU in `make gpu-test`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """torch.distributed, Megatron's groups and random generators in a world of this process."""
    from mrlhf.config.options import ParallelConfig
    from mrlhf.parallel import state

    before = dict(os.environ)
    state.initialize(ParallelConfig(), seed=1)
    yield
    state.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """What a test leaves in torch's cache would be missing for processes that a later one starts."""
    yield
    if os.environ["MRLHF_DEVICE"] == "cuda":
        torch.cuda.empty_cache()
