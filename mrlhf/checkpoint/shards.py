"""Which part of which tensor of a checkpoint each tensor of this rank is: weights and optimizer state alike.

A checkpoint holds whole tensors, `optimizer.state.KIND.NAME` in the shape of the weight NAME. Megatron says where the
weights of a rank lie in them. Its distributed optimizer holds a contiguous piece of each parameter, [start, end) of the
flattened values. Such a piece is at most a few boxes of the tensor: the rest of a row, whole rows, a part of a row. So
every rank writes and reads exactly the state that it holds, and no rank gathers another's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from mrlhf.models import gpt
from mrlhf.parallel import megatron

_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Shard:
    """`data` lies at `offset` in the checkpoint's tensor `key`; it shares the memory of the model or the optimizer."""

    key: str
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    data: torch.Tensor  # with a dimension for each of `global_shape`
    copies: int  # data-parallel ranks that hold these values
    copy: int | None  # which of them this rank is; None: the copies of another rank are written
    padded: bool  # rows of a vocabulary, which another checkpoint may have padded otherwise


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that elements [start, end) of a row-major tensor make, in their order."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row, zeros = math.prod(shape[1:]), (0,) * (len(shape) - 1)
    (first, low), (last, high) = divmod(start, row), divmod(end, row)
    if low:
        yield from (((first, *o), (1, *s)) for o, s in boxes(shape[1:], low, min(row, end - first * row)))
        first += 1
    if last > first:
        yield (first, *zeros), (last - first, *shape[1:])
    if high and last >= first:
        yield from (((last, *o), (1, *s)) for o, s in boxes(shape[1:], 0, high))


class Sharding:
    """The shards of this rank's part of a model and of its optimizer.

    models: the chunks of an interleaved pipeline, or one model.
    """

    def __init__(self, models: list[Any]) -> None:
        self._state, self._metadata = gpt.sharded_state(models), gpt.sharding_metadata(models[0])
        self._copies = {False: models[0].pg_collection.dp_cp.size(), True: models[0].pg_collection.expt_dp.size()}
        self._values = list(nested_values(dict(self._state)))

    def weights(self) -> list[Shard]:
        bases = [value for value in self._values if not isinstance(value, ShardedObject)]
        return [self._shard(leaf) for base in bases for leaf in _leaves(base)]

    def objects(self) -> list[tuple[str, Any]]:
        """(name in the checkpoint, value) of what is no tensor and this rank writes."""
        objects = [v for v in self._values if isinstance(v, ShardedObject) and is_main_replica(v.replica_id)]
        return [(o.unique_key, o.data) for o in objects]

    def optimizer(self, chain: Any) -> tuple[list[Shard], Any]:
        """The shards of Megatron's chain of optimizers, and the rest of their state as Megatron's checkpoints hold it.

        An optimizer that has not stepped yet (an actor while its critic warms up) makes its state here.
        """
        shards, rest, weights = list[Shard](), dict[int, Any](), dict(self._state)
        for i, part in enumerate(chain.chained_optimizers):
            if getattr(part, "is_stub_optimizer", False):
                continue
            part.init_state_fn(part.optimizer, part.config)
            if megatron.is_distributed(part):
                rest[i] = {**part.state_dict(), "param_state_sharding_type": gpt.OPTIMIZER_FORMAT}
                shards += self._slices(part)
            else:
                sharded, rest[i] = save_preprocess(part.sharded_state_dict(weights, metadata=self._metadata), False)
                shards += [self._shard(tensor) for tensor in nested_values(sharded)]
        return shards, rest if len(chain.chained_optimizers) > 1 else rest.get(0)

    def _slices(self, optimizer: Any) -> Iterator[Shard]:
        """The shards of a distributed optimizer: of each parameter this rank holds the state of some values."""
        bases = {id(value.data): value for value in self._values}
        for parameter, start, end, tensors in megatron.optimizer_slices(optimizer):
            for leaf in _leaves(bases[id(parameter)]):
                assert leaf.data is not None and leaf.data.is_contiguous(), leaf
                shard = self._shard(leaf)
                first = leaf.data.storage_offset() - parameter.storage_offset()  # in the flat parameter
                at = max(start, first)
                for offset, size in boxes(shard.data.shape, at - first, min(end - first, leaf.data.numel())):
                    place = tuple(a + b for a, b in zip(shard.offset, offset, strict=True))
                    values = slice(at - start, at - start + math.prod(size))
                    at += math.prod(size)
                    for kind, flat in tensors.items():
                        yield replace(shard, key=f"optimizer.state.{kind}.{shard.key}", offset=place, copies=1,
                                      copy=None if shard.copy is None else 0, data=flat.detach()[values].view(size))

    def _shard(self, tensor: ShardedTensor) -> Shard:
        assert tensor.data is not None and isinstance(tensor.replica_id, tuple), tensor
        *others, copy = tensor.replica_id
        data = tensor.data.detach()[(None,) * tensor.prepend_axis_num]
        return Shard(tensor.key, tuple(tensor.global_offset), tuple(tensor.global_shape), data,
                     self._copies[_EXPERTS in tensor.key], None if any(others) else copy, tensor.allow_shape_mismatch)


def _leaves(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The first matrix of a gated MLP is two shards, its halves, which Megatron's factory makes."""
    return list(nested_values(base.build())) if isinstance(base, ShardedTensorFactory) else [base]


def written(shards: Iterable[Shard]) -> list[Shard]:
    """What this rank writes: each of the ranks that hold equal shards writes its part of them, by bytes."""
    candidates = [(s, (_EXPERTS in s.key, s.copies)) for s in shards if s.copy is not None]
    total, before, kept = Counter[Any](), Counter[Any](), []
    for shard, kind in candidates:
        total[kind] += shard.data.nbytes
    for shard, kind in candidates:
        if before[kind] * shard.copies // max(1, total[kind]) == shard.copy:
            kept.append(shard)
        before[kind] += shard.data.nbytes
    return kept
