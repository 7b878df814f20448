"""Loads optimizer state by parameter name, whichever of Megatron's optimizers wrote it.

Names on disk, for the parameter NAME:
  distributed                optimizer.state.{param,exp_avg,exp_avg_sq}.NAME
  not distributed, bfloat16  optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.NAME
  not distributed, float32   optimizer.state.{exp_avg,exp_avg_sq}.NAME; the weights NAME are the masters
An optimizer of experts that lie over ranks is separate. Until format 2 its names, and those of the dense one beside it,
began with `chained_I.`. All tensors have the shapes of the parameters, so any layout reads its own slices.

Of the parameter groups only `step` is read: all else in them comes from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mrlhf.checkpoint.names import plain_name
from mrlhf.checkpoint.reader import DistReader
from mrlhf.checkpoint.safe_pickle import check_directory, read_common
from mrlhf.checkpoint.shards import Sharding
from mrlhf.errors import CheckpointError

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)", re.DOTALL)
_MASTER = "param"


def open_dist(directory: Path) -> DistReader:
    """The tensors of a checkpoint that mrlhf has written. Raises CheckpointError where another pickle than that of its
    index asks for what no checkpoint needs, or damage shows.
    """
    return DistReader(directory, check_directory(directory))


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's name in a checkpoint -> (kind of state, parameter); the kind of every master weight is "param"."""
    match = _STATE.fullmatch(name)
    return (match[1].replace("fp32_param", _MASTER), match[2]) if match else None


def translate(wanted: Iterable[tuple[str, torch.dtype]], stored: Mapping[str, torch.dtype], *, where: str) -> list[str]:
    """The names in the checkpoint of the weights and the optimizer state that this rank wants.

    wanted: name and dtype. stored: dtype by name of all tensors in the checkpoint.
    A master weight that was not written is the weight itself, if that is float32. A float32 weight is the master, if
    the weight was written in less. Raises CheckpointError naming the parameters whose state is missing.
    """
    known = {key: name for name in stored if (key := split_name(name))}
    names, missing = [], []
    for name, dtype in wanted:
        kind, parameter = split_name(name) or ("", name)
        master = known.get((_MASTER, parameter))
        if not kind:
            rounded = dtype == torch.float32 != stored.get(name, dtype)
            names.append(master if rounded and master else name)
        elif (kind, parameter) in known:
            names.append(known[kind, parameter])
        elif kind == _MASTER and stored.get(parameter) == torch.float32:
            names.append(parameter)
        else:
            missing.append(f"{parameter} ({kind})")
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"no optimizer state of {shown}", where=where, expected="the state of every parameter",
                              fix="start from its weights: --model.path with another --train.output_dir")
    return names


def load_optimizer(directory: Path, models: list[Any], optimizer: Any) -> None:
    """Loads weights and optimizer state from a checkpoint directory, whatever layout and optimizer wrote them.

    models: this rank's chunks. optimizer: Megatron's chain of optimizers.
    Raises CheckpointError where the state of a parameter is missing.
    """
    sharding, dist = Sharding(models), directory / "dist"
    shards = [*sharding.weights(), *sharding.optimizer(optimizer)[0]]
    reader = open_dist(dist)
    wanted = [(plain_name(s.key), s.data.dtype) for s in shards]
    names = translate(wanted, reader.dtypes, where=str(directory))
    reader.fill(replace(s, key=name) for s, name in zip(shards, names, strict=True))
    reader.close()
    step = next(_steps(read_common(dist).get("optimizer")), None)
    for group in optimizer.param_groups if step is not None else ():
        group["step"] = step


def _steps(common: Any) -> Iterator[int]:
    """The step counts in a checkpoint's parameter groups, which are all equal; none before the first step."""
    if isinstance(common, dict):
        if "step" in common:
            yield int(common["step"])
        common = list(common.values())
    for value in common if isinstance(common, list) else []:
        yield from _steps(value)
