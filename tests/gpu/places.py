"""How a test is given both places, and how far two results are apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from conftest import python, run, torchrun


def in_places(
    names: str, *, cpu: Iterable[tuple], gpu: Iterable[tuple] = (), gpu8: Iterable[tuple] = ()
) -> pytest.MarkDecorator:
    """Parametrizes `place` and `names`: the cases of `make test`, and by markers those of one GPU and of eight."""
    cases = [pytest.param("cpu", *case) for case in cpu]
    cases += [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in gpu]
    cases += [pytest.param("cuda", *case, marks=pytest.mark.gpu8) for case in gpu8]
    return pytest.mark.parametrize(f"place,{names}", cases)


def program(
    place: str, *command: object, ranks: int = 1, vllm: bool = False, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a program. On GPUs no process is a fork of another, which CUDA forbids."""
    if place == "cpu":
        return python(*command, ranks=ranks, vllm=vllm, timeout=timeout)
    if ranks == 1:
        return run(sys.executable, *command, timeout=timeout)
    return torchrun(ranks, *command, timeout=timeout)


def apart(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> float:
    """|found - wanted| / |wanted| over all tensors together; NaN counts as infinitely far."""
    difference = total = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = (x.detach().double().cpu() for x in (a, b))
        difference += float((a - b).square().sum())
        total += float(b.square().sum())
    ratio = (difference / total) ** 0.5
    return ratio if ratio == ratio else float("inf")
