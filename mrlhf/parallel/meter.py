"""Counts what fake CUDA tensors do: bytes that live, products, messages, and where the host waits for the device.

Values of fake tensors do not exist, but lengths, masks and counts steer the program. So small tensors made from host
data carry their real value along (`_Values`), computed beside each operation. Where a value is not known, a number
reads as 1, and what chooses by value (topk) chooses every column equally often.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_SMALLEST = 512  # bytes: the CUDA allocator's step
_MOST_FLOATS, _MOST_INTS = 1 << 16, 1 << 22  # numbers of a tensor whose value is carried along
_FROM_SHAPE = {"arange", "zeros", "ones", "full", "eye", "scalar_tensor", "zeros_like", "ones_like", "full_like",
               "new_zeros", "new_ones", "new_full"}
# the size of their result, or a decision in the program, depends on values
_WAITS = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
          aten.bincount.default, aten.equal.default, aten.repeat_interleave.Tensor, aten.unique_consecutive.default}
_UNCOALESCED = {"c10d::reduce_scatter_tensor_coalesced_", "c10d::allgather_into_tensor_coalesced_",
                "c10d::allreduce_coalesced_"}


@dataclass(frozen=True)
class Message:
    """One collective, send or receive of this rank. group: torch's name of it. peer: of a send or a receive.

    nbytes: of the larger side. splits: bytes to and from each rank of the group, of an all-to-all.
    """

    phase: str
    op: str
    nbytes: int
    group: str
    ranks: tuple[int, ...]
    device: str
    peer: int | None = None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None


_current: Meter | None = None


def current() -> Meter:
    """The meter of the rehearsal in progress."""
    assert _current is not None, "no rehearsal has begun"
    return _current


def set_current(meter: Meter | None) -> None:
    global _current
    _current = meter


def place(skip: tuple[str, ...] = ("/torch/", "/mrlhf/parallel/meter.py", "/mrlhf/parallel/fake_cuda.py")) -> str:
    """file:function of the innermost caller outside of torch and the rehearsal."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in skip) and not file.startswith("<"):
            for package in ("/mrlhf/", "/megatron/"):
                _, at, rest = file.rpartition(package)
                if at:
                    file = package[1:] + rest
                    break
            return f"{file}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


class Meter(TorchDispatchMode):
    """Above the fake mode, so that it sees every operation. All numbers are also kept by `phase`.

    square: a CUDA tensor that has two dimensions of at least this length is noted in `squares`.
    kept: the share of True in a mask whose values are not known.
    """

    def __init__(self, *, square: int | None, kept: float) -> None:
        super().__init__()
        self.square, self.kept, self.phase = square, kept, "build"
        self.live = self.peak = 0
        self.peaks: dict[str, tuple[int, Counter[str]]] = {}  # phase -> bytes, of which by part
        self.live_by_part: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.messages: list[Message] = []
        self.waits: Counter[tuple[str, str]] = Counter()  # (phase, place)
        self.copies: Counter[tuple[str, str]] = Counter()  # (phase, direction) -> bytes
        self.squares: Counter[str] = Counter()
        self.values = _Values()
        self._sizes: dict[int, int] = {}  # storage -> bytes
        self._parts: dict[int, str] = {}
        self._refs: dict[int, Any] = {}

    # memory

    def _change(self, key: int, size: int) -> None:
        """A storage has `size` bytes from now on."""
        more = size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.live += more
        self.live_by_part[self._parts.get(key, "other")] += more
        self.peak = max(self.peak, self.live)
        if self.phase not in self.peaks or self.live > self.peaks[self.phase][0]:
            self.peaks[self.phase] = self.live, self.live_by_part.copy()

    def _gone(self, key: int, _: Any) -> None:
        self._change(key, 0)
        for table in (self._sizes, self._parts, self._refs):
            table.pop(key, None)  # type: ignore[attr-defined]

    def see(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _SMALLEST) * _SMALLEST
        if key not in self._refs:
            self._refs[key] = weakref.ref(storage, functools.partial(self._gone, key))
        if self._sizes.get(key) != size:
            self._change(key, size)

    def resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._refs:
            self._change(storage._cdata, -(-storage.nbytes() // _SMALLEST) * _SMALLEST)

    def owns(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._refs

    def name_part(self, part: str, tensors: list[torch.Tensor]) -> None:
        """Counts these tensors' storages as `part` from now on."""
        for key in {t.untyped_storage()._cdata for t in tensors} & self._sizes.keys():
            self.live_by_part[self._parts.get(key, "other")] -= self._sizes[key]
            self._parts[key] = part
            self.live_by_part[part] += self._sizes[key]

    def reset_peak(self) -> None:
        self.peak = self.live

    def enter_phase(self, name: str) -> None:
        self.phase = name
        if name not in self.peaks or self.live > self.peaks[name][0]:
            self.peaks[name] = self.live, self.live_by_part.copy()

    # the host

    def wait(self) -> None:
        """The host waits for the device, here."""
        self.waits[self.phase, place()] += 1

    def read(self, tensor: torch.Tensor) -> Any:
        """The tensor's numbers, in nested lists, as the program reads them; ones where they are not known."""
        if tensor.device.type == "cuda":
            self.waits[self.phase, place()] += 1
        value = self.values.of(tensor)
        with _disable_current_modes():
            return (torch.ones(tensor.shape, dtype=tensor.dtype) if value is None else value).tolist()

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a tensor's device
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        on_device = any(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in tree_leaves((args, kwargs)))
        if func in (aten._local_scalar_dense.default, aten.item.default):
            value = self.read(args[0])
            while isinstance(value, list):  # of shape [1]
                [value] = value
            return value
        if on_device and (func in _WAITS or func is aten.index.Tensor and _has_mask(args[1])):
            self.wait()
        value = self.values.compute(func, args, kwargs)
        out = self._of_unknown_size(func, args, value)
        if out is None:
            out = func(*args, **kwargs)
        self.values.remember(func, args, out, value)
        self._count(func, args, kwargs, out)
        return out

    def _of_unknown_size(self, func: Any, args: Any, value: Any) -> Any:
        """The result of an operation whose shape depends on values; fake tensors would not have one. None: any other.
        """
        if func is aten.equal.default:
            return True if value is None else value
        if func is aten.index.Tensor and _has_mask(args[1]):
            parts = [self._rows_of(i) if _is_mask(i) else [slice(None) if i is None else i] for i in args[1]]
            return args[0][tuple(part for some in parts for part in some)]
        if func not in _WAITS or isinstance(value, tuple):
            return None
        dtype = args[0].dtype
        if isinstance(value, torch.Tensor):
            shape, dtype = value.shape, value.dtype
        elif func is aten.nonzero.default:
            shape, dtype = torch.Size([self._true(args[0]), args[0].dim()]), torch.long
        elif func is aten.masked_select.default:
            times = math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) // max(1, args[1].numel())
            shape = torch.Size([self._true(args[1]) * times])
        else:
            return None
        return torch.empty(shape, dtype=dtype, device=args[0].device)

    def _true(self, mask: torch.Tensor) -> int:
        value = self.values.of(mask)
        with _disable_current_modes():
            return round(mask.numel() * self.kept) if value is None else int(value.count_nonzero())

    def _rows_of(self, mask: torch.Tensor) -> list[torch.Tensor]:
        rows = self._true(mask)
        return [torch.zeros(rows, dtype=torch.long, device=mask.device) for _ in range(mask.dim())]

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, FakeTensor) and t.device.type == "cuda":
                self.see(t)
                if self.square and sum(n >= self.square for n in t.shape) > 1:
                    self.squares[f"{func.name()} {tuple(t.shape)} at {place()}"] += 1
        if func in (aten._to_copy.default, aten.copy_.default):
            source, target = (args[0], out) if func is aten._to_copy.default else (args[1], args[0])
            if source.device.type != target.device.type:
                blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
                self.copies[self.phase, f"{source.device.type}->{target.device.type}"] += source.nbytes
                if blocks and source.device.type == "cuda":
                    self.wait()
        elif func._overloadpacket in flop_registry:
            self.flops[self.phase] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif func.namespace == "torch_attn":
            self.flops[self.phase] += self._varlen_flops(func, args)

    def _varlen_flops(self, func: Any, args: Any) -> int:
        """Of causal attention: 2 products forward and 5 backward, over the pairs that see each other."""
        products, first = (5, 1) if "backward" in func.name() else (2, 0)
        query, cu = args[first], next(x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.int32)
        bounds = self.values.of(cu)
        with _disable_current_modes():
            lengths = [query.size(0)] if bounds is None else bounds.diff().tolist()
        return products * query.size(1) * query.size(2) * sum(n * (n + 1) for n in lengths)

    # messages

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.name()
        message = self._message(name.removeprefix("c10d::").strip("_"), args)
        self.messages.append(message)
        if name in _UNCOALESCED:  # have no fake kernel; any finished work will do
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            out = torch.ops.c10d.barrier.default(torch.empty(1), group, [], True)
        else:
            out = func(*args, **kwargs)
        self.values.exchanged(name, args, len(message.ranks))
        return out

    def _message(self, op: str, args: Any) -> Message:
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        group = next(dist.ProcessGroup.unbox(a) for a in args if _is_group(a))  # type: ignore[attr-defined]
        ranks = tuple(dist.get_process_group_ranks(group))
        sides = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args]
        peer, splits = None, None
        if op in ("send", "recv"):
            peer = ranks[args[2]]
        if op == "alltoall_base":
            row = tensors[0].nbytes // max(1, tensors[0].size(0)) or tensors[1].nbytes // max(1, tensors[1].size(0))
            to, of = (tuple(n * row for n in (some or [t.size(0) // len(ranks)] * len(ranks)))
                      for some, t in ((args[4], tensors[1]), (args[3], tensors[0])))
            splits = to, of
        device = tensors[0].device.type if tensors else "none"
        return Message(self.phase, op, max(sides), group.group_name, ranks, device, peer, splits)


@functools.cache
def _is_composite(func: Any) -> bool:
    """A mode sees also some operations that are others put together; those with a kernel of their own stay whole."""
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has_kernel("CompositeImplicitAutograd") and not has_kernel("CUDA")


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _has_mask(indices: Any) -> bool:
    return any(_is_mask(i) for i in indices)


class _Values:
    """Values of small fake tensors, computed on the CPU beside each operation, views and changes in place included."""

    def __init__(self) -> None:
        self._unknown: dict[int, Any] = {}  # storages into which something unknown was written

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(x, FakeTensor):
            return x
        return None if x.untyped_storage()._cdata in self._unknown else getattr(x, "_mrlhf_value", None)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result on real tensors, if all that go in are known and it is small; else None."""
        name = func.name().partition("::")[2].partition(".")[0]
        if func is aten.topk.default and self.of(args[0]) is None:
            return self._spread(args[0], *args[1:])
        flat, spec = tree_flatten((args, kwargs))
        from_shape = name in _FROM_SHAPE
        if torch.Tag.nondeterministic_seeded in func.tags or name.startswith(("empty", "new_empty", "rand")):
            return None
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if from_shape and (not tensors or name.startswith(("zeros", "ones", "new"))):
            if not self._is_small(name, args, kwargs, tensors):
                return None
        elif not tensors or any(self.of(x) is None or not _small(x) for x in tensors):
            return None
        with _disable_current_modes():
            if from_shape and tensors:  # of the shape and dtype alone
                flat = [torch.empty(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in flat]
            flat = [self.of(x) if isinstance(x, torch.Tensor) else torch.device("cpu") if isinstance(x, torch.device)
                    else x for x in flat]
            args, kwargs = tree_unflatten(flat, spec)
            kwargs.pop("pin_memory", None)
            return func(*args, **kwargs)

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

    def remember(self, func: Any, args: Any, out: Any, value: Any) -> None:
        if value is None:
            if func._schema.is_mutable:
                for argument, spec in zip(args, func._schema.arguments, strict=False):
                    if spec.alias_info is not None and spec.alias_info.is_write:
                        self._forget(t for t in tree_leaves(argument) if isinstance(t, FakeTensor))
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
        written = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        change: Callable[[torch.Tensor], torch.Tensor] | None = None
        if name in ("c10d::broadcast_", "c10d::send", "c10d::barrier"):
            return
        if name == "c10d::allreduce_":
            total = args[2] is not None and "SUM" in str(dist.ReduceOp(dist.ReduceOp.SUM)) and _is_sum(args[2])
            for t in written:
                v = self.of(t)
                if v is None:
                    self._forget(iter([t]) if isinstance(t, FakeTensor) else iter([]))
                elif total:
                    with _disable_current_modes():
                        v.mul_(size)
            return
        if name == "c10d::_allgather_base_":
            change = lambda v: v.flatten().repeat(size).view(written[0].shape)  # noqa: E731
        source = self.of(args[1]) if change is not None else None
        if change is not None and source is not None and isinstance(written[0], FakeTensor):
            with _disable_current_modes():
                written[0]._mrlhf_value = change(source)  # type: ignore[attr-defined]
            return
        self._forget(t for t in tree_leaves(written) if isinstance(t, FakeTensor))


def _is_sum(op: Any) -> bool:
    return "SUM" in str(op)


def _small(x: torch.Tensor) -> bool:
    return x.numel() <= (_MOST_FLOATS if x.dtype.is_floating_point else _MOST_INTS)


__all__ = ["Message", "Meter", "current", "place", "set_current", "tree_map"]
