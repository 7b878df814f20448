"""Loads optimizer state by parameter name, whichever of Megatron's optimizers wrote it.

Names on disk, for the parameter NAME:
  distributed                optimizer.state.{param,exp_avg,exp_avg_sq}.NAME
  not distributed, bfloat16  optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.NAME
  not distributed, float32   optimizer.state.{exp_avg,exp_avg_sq}.NAME; the weights NAME are the masters
An optimizer of experts that lie over ranks is separate. Its names, and those of the dense one beside it, began with
`chained_I.` before this version. All tensors have the shapes of the parameters, so any layout reads its own slices.

Of the parameter groups only `step` is read: all else in them comes from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mrlhf.checkpoint.safe_pickle import check_directory
from mrlhf.errors import CheckpointError
from mrlhf.parallel.state import on_any_rank

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)", re.DOTALL)
_MASTER = "param"


def load_dist(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fills `state`. Raises CheckpointError before it unpickles anything that a checkpoint does not hold."""
    check_directory(directory)
    return _load(state, directory)


def _load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Of a directory that `check_directory` has passed."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(state, str(directory))


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

    models: this rank's chunks. optimizer: Megatron's chain of optimizers. Collective.
    Raises CheckpointError where the state of a parameter is missing.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from mrlhf.models import gpt

    weights, dist = gpt.sharded_state(models), directory / "dist"
    parts = [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
    by_chunk, metadata = weights["model"] if len(models) == 1 else dict(weights), gpt.sharding_metadata(models[0])
    state = {str(i): part.sharded_state_dict(by_chunk, is_loading=True, metadata=metadata)
             for i, part in enumerate(parts)}
    stored = {name: entry.properties.dtype for name, entry in check_directory(dist).state_dict_metadata.items()
              if hasattr(entry, "properties")}
    of_weights, of_state = ([t for t in nested_values(part) if isinstance(getattr(t, "data", None), torch.Tensor)]
                            for part in (weights, state))
    tensors = [*of_weights, *of_state]
    names = translate([(t.key, t.data.dtype) for t in tensors], stored, where=str(directory))
    for tensor, name in zip(tensors, names, strict=True):
        tensor.key = name
    with torch.no_grad():
        # weights and masters of one name need two loads, which are collective
        twice = on_any_rank(not {t.key for t in of_weights}.isdisjoint(t.key for t in of_state))
        wanted = [weights, {"state": state}] if twice else [{**weights, "state": state}]
        loaded = {key: value for part in wanted for key, value in _load(part, dist).items()}
        for chunk, model in zip(weights, models, strict=True):
            model.load_state_dict(loaded[chunk])
        step = next(_steps(loaded.get("optimizer")), None)
        for i, part in enumerate(parts):
            own = _with_groups(loaded["state"][str(i)], part.optimizer.param_groups, step)
            part.load_state_dict({**own, "param_state_sharding_type": metadata["distrib_optim_sharding_type"]})


def _steps(common: Any) -> Iterator[int]:
    """The step counts in a checkpoint's parameter groups, which are all equal; none before the first step."""
    if isinstance(common, dict):
        if "step" in common:
            yield int(common["step"])
        common = list(common.values())
    for value in common if isinstance(common, list) else []:
        yield from _steps(value)


def _with_groups(read: dict[str, Any], groups: list[dict[str, Any]], step: int | None) -> dict[str, Any]:
    """The state of one optimizer in the form of its `load_state_dict`: the tensors that were read, its own groups."""
    own = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in groups]
    own = [g if step is None else {**g, "step": step} for g in own]
    if "param_state" in read:  # distributed
        return {"optimizer": {"param_groups": own}, "param_state": read["param_state"]}
    inner = read.get("optimizer", read)
    numbered = [{**g, "params": r["params"]} for g, r in zip(own, inner["param_groups"], strict=True)]
    state = {"state": inner["state"], "param_groups": numbered}
    return {**read, "optimizer": state} if "optimizer" in read else state
