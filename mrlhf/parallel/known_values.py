"""Values of small fake tensors, which do not exist, carried along where they come from the host's data.

Lengths, masks and counts steer a program. So a small tensor made from host data has its real value beside it, computed
with each operation. What chooses by unknown values (topk) chooses every column equally often. A few numbers of which
some are known (a sum of losses and the count beside it) have nan for the others.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_MOST_FLOATS, _MOST_INTS = 1 << 16, 1 << 22  # numbers of a tensor whose value is carried along
_FROM_SHAPE = {"arange", "zeros", "ones", "full", "eye", "scalar_tensor", "zeros_like", "ones_like", "full_like",
               "new_zeros", "new_ones", "new_full"}
# with nan for what is not known, their results have nan just where they are not known
_BY_ELEMENT = set("stack cat select slice view reshape _unsafe_view unsqueeze squeeze expand unbind split alias t "
                  "detach clone lift_fresh _to_copy copy_ zero_ fill_ index_select add add_ sub mul mul_ div div_ "
                  "sum".split())
_MOST_PARTLY_KNOWN = 64  # numbers
_WAITS = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
          aten.bincount.default, aten.equal.default, aten.repeat_interleave.Tensor, aten.unique_consecutive.default,
          aten.index.Tensor}


@dataclass(frozen=True)
class Op:
    """What the meter asks of an operation, once for all its calls."""

    name: str
    is_message: bool
    is_device: bool  # a tensor's device, a question and no work
    is_number: bool
    is_composite: bool  # others put together; a mode sees also some of these
    waits: bool  # the size of its result, or a decision of the program, depends on values
    copies: bool
    is_view: bool
    is_varlen: bool
    from_shape: bool  # its values follow from its arguments' shapes
    is_random: bool
    by_element: bool
    writes: tuple[int, ...]  # arguments
    flops: Any


_ops: dict[int, Op] = {}


def op_of(func: Any) -> Op:
    if id(func) not in _ops:
        full = func.name()
        name, has = full.partition("::")[2].partition(".")[0], torch._C._dispatch_has_kernel_for_dispatch_key
        # one with a kernel of its own stays whole
        is_composite = func.namespace != "prim" and has(full, "CompositeImplicitAutograd") and not has(full, "CUDA")
        arguments = enumerate(func._schema.arguments)
        _ops[id(func)] = Op(
            name, func.namespace == "c10d", func.namespace == "prim", name in ("item", "_local_scalar_dense"),
            is_composite, func in _WAITS, name in ("_to_copy", "copy_"), func.is_view or name == "_unsafe_view",
            func.namespace == "torch_attn", name in _FROM_SHAPE,
            torch.Tag.nondeterministic_seeded in func.tags or name.startswith(("empty", "new_empty", "rand")),
            name in _BY_ELEMENT, tuple(i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write),
            flop_registry.get(func._overloadpacket),
        )
    return _ops[id(func)]


class Values:
    """Values of small fake tensors, computed on the CPU beside each operation, views and changes in place included."""

    def __init__(self) -> None:
        self._unknown: dict[int, Any] = {}  # storages into which something unknown was written

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(x, FakeTensor):
            return x
        return None if x.untyped_storage()._cdata in self._unknown else getattr(x, "_mrlhf_value", None)

    def compute(self, func: Any, op: Op, args: Any, kwargs: Any) -> Any:
        """The result on real tensors, if all that go in are known and it is small; else None."""
        if op.is_random or op.is_varlen:
            return None
        if func is aten.topk.default and self.of(args[0]) is None:
            return self._spread(args[0], *args[1:])
        if not op.from_shape and not op.by_element and any(_lacks(self, x) for x in args):
            return None
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if op.from_shape and (not tensors or op.name.startswith(("zeros", "ones", "new"))):
            if not self._is_small(op.name, args, kwargs, tensors):
                return None
        elif op.by_element:
            return self._by_element(func, flat, spec)
        elif not tensors or any(not _small(x) or _lacks(self, x) for x in tensors):
            return None
        with _disable_current_modes():
            if op.from_shape and tensors:  # of the shape and dtype alone
                flat = [torch.empty(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in flat]
            return _on_host(func, [self.of(x) if isinstance(x, torch.Tensor) else x for x in flat], spec)

    def _by_element(self, func: Any, flat: list[Any], spec: Any) -> Any:
        """As `compute`, with nan for what is not known of a few numbers."""
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        known = [self.of(x) for x in tensors]
        if not tensors or all(v is None for v in known) or any(not _small(x) for x in tensors):
            return None
        if any(v is None and (x.numel() > _MOST_PARTLY_KNOWN or not x.is_floating_point())
               for x, v in zip(tensors, known, strict=True)):
            return None
        with _disable_current_modes():
            values = iter(torch.full(x.shape, torch.nan, dtype=x.dtype) if v is None else v
                          for x, v in zip(tensors, known, strict=True))
            return _on_host(func, [next(values) if isinstance(x, torch.Tensor) else x for x in flat], spec)

    @staticmethod
    def _is_small(name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
        if name == "arange":
            return True
        size = args[1] if name.startswith("new") else tensors[0].shape if tensors else args[0] if args else ()
        dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
        floats = dtype is None or dtype.is_floating_point
        return not isinstance(size, (list, tuple)) or math.prod(size) <= (_MOST_FLOATS if floats else _MOST_INTS)

    @staticmethod
    def _spread(x: torch.Tensor, k: int, dim: int = -1, *_: Any) -> Any:
        """topk's indices, as if every column were chosen equally often. Its values stay unknown."""
        if dim not in (-1, x.dim() - 1) or x.numel() > _MOST_INTS:
            return None
        with _disable_current_modes():
            rows = math.prod(x.shape[:-1])
            return None, (torch.arange(rows * k) % x.size(-1)).view(*x.shape[:-1], k)

    def remember(self, op: Op, args: Any, out: Any, value: Any) -> None:
        if value is None:
            for i in op.writes:
                if i < len(args):
                    self._forget(t for t in tree_leaves(args[i]) if isinstance(t, FakeTensor))
            return
        flat_out = out if isinstance(out, (tuple, list)) else (out,)
        values = value if isinstance(value, (tuple, list)) else (value,)
        for x, v in zip(flat_out, values, strict=False):
            if isinstance(x, FakeTensor) and isinstance(v, torch.Tensor):
                x._mrlhf_value = v  # type: ignore[attr-defined]

    def _forget(self, tensors: Iterator[FakeTensor]) -> None:
        for t in tensors:
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self._unknown:
                self._unknown[key] = weakref.ref(storage, functools.partial(self._unknown.pop, key))

    def exchanged(self, name: str, args: Any, size: int) -> None:
        """After a collective. Other ranks' values are taken to be this rank's own."""
        written = [t for t in tree_leaves(args[0]) if isinstance(t, FakeTensor)]
        if name in ("c10d::broadcast_", "c10d::send", "c10d::barrier"):
            return
        if name == "c10d::allreduce_":
            for t in written:
                value = self.of(t)
                if value is None:
                    self._forget(iter([t]))
                elif args[2].op() == dist.ReduceOp.SUM:
                    with _disable_current_modes():
                        value.mul_(size)
            return
        source = self.of(args[1]) if name == "c10d::_allgather_base_" else None
        if source is None:
            self._forget(iter(written))
            return
        with _disable_current_modes():
            for t in written:
                t._mrlhf_value = source.flatten().repeat(size).view(t.shape)  # type: ignore[attr-defined]


def _on_host(func: Any, flat: list[Any], spec: Any) -> Any:
    args, kwargs = tree_unflatten([torch.device("cpu") if isinstance(x, torch.device) else x for x in flat], spec)
    kwargs.pop("pin_memory", None)
    return func(*args, **kwargs)


def readable(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), 1, value) if value.is_floating_point() else value


def _lacks(values: Values, x: Any) -> bool:
    """Whether some number of a tensor is not known."""
    if not isinstance(x, FakeTensor):
        return False
    value = values.of(x)
    if value is None or not value.is_floating_point():
        return value is None
    with _disable_current_modes():
        return bool(value.isnan().any())


def _small(x: torch.Tensor) -> bool:
    return x.numel() <= (_MOST_FLOATS if x.dtype.is_floating_point else _MOST_INTS)

