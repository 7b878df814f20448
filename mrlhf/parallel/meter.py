"""Counts what fake CUDA tensors do: bytes that live, products, messages, and where the host waits for the device.

Values of fake tensors do not exist, but lengths, masks and counts steer the program: known_values.py carries those
along. Where a value is not known, a number reads as 1.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from mrlhf.parallel.known_values import Op, Values, op_of, readable

aten = torch.ops.aten
_SMALLEST = 512  # bytes: the CUDA allocator's step
_UNCOALESCED = {f"c10d::{name}_coalesced_" for name in ("allreduce", "reduce_scatter_tensor", "allgather_into_tensor")}
_OURS = "/torch/", *(f"/mrlhf/parallel/{name}.py" for name in ("meter", "known_values", "fake_cuda"))


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


def place(skip: tuple[str, ...] = _OURS) -> str:
    """file:function of the innermost caller outside of torch and the rehearsal."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        is_mode = frame.f_code.co_name in ("__torch_dispatch__", "__torch_function__")
        if not is_mode and not file.startswith("<") and not any(part in file for part in skip):
            for package in ("/mrlhf/", "/megatron/"):
                _, at, rest = file.rpartition(package)
                if at:
                    file = package[1:] + rest
                    break
            while frame.f_code.co_name.endswith(("comp>", "expr>")) and frame.f_back is not None:
                frame = frame.f_back
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
        self.squares: Counter[tuple[str, str]] = Counter()  # (phase, operation, shape and place)
        self.values = Values()
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
            return (torch.ones(tensor.shape, dtype=tensor.dtype) if value is None else readable(value)).tolist()

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, op_of(func)
        if op.is_device:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        if op.is_message:
            return self._communicate(func, args, kwargs)
        if op.is_number:
            value = self.read(args[0])
            while isinstance(value, list):  # of shape [1]
                [value] = value
            return value
        if op.is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        if op.waits and args[0].device.type == "cuda" and (func is not aten.index.Tensor or _has_mask(args[1])):
            self.wait()
        value = self.values.compute(func, op, args, kwargs)
        out = self._of_unknown_size(func, args, value) if op.waits else None
        if out is None:
            out = func(*args, **kwargs)
        self.values.remember(op, args, out, value)
        self._count(func, op, args, kwargs, out)
        return out

    def _of_unknown_size(self, func: Any, args: Any, value: Any) -> Any:
        """The result of an operation whose shape depends on values; fake tensors would not have one. None: any other.
        """
        if func is aten.equal.default:
            return True if value is None else value
        if func is aten.index.Tensor and _has_mask(args[1]):
            parts = [self._rows_of(i) if _is_mask(i) else [slice(None) if i is None else i] for i in args[1]]
            return args[0][tuple(part for some in parts for part in some)]
        device = args[0].device
        if value is not None:
            return tree_map(lambda v: torch.empty(v.shape, dtype=v.dtype, device=device), value)
        if func is aten.nonzero.default:
            return torch.empty(self._true(args[0]), args[0].dim(), dtype=torch.long, device=device)
        if func is aten.masked_select.default:
            times = math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) // max(1, args[1].numel())
            return torch.empty(self._true(args[1]) * times, dtype=args[0].dtype, device=device)
        return None

    def _true(self, mask: torch.Tensor) -> int:
        value = self.values.of(mask)
        with _disable_current_modes():
            return round(mask.numel() * self.kept) if value is None else int(value.count_nonzero())

    def _rows_of(self, mask: torch.Tensor) -> list[torch.Tensor]:
        rows = self._true(mask)
        return [torch.zeros(rows, dtype=torch.long, device=mask.device) for _ in range(mask.dim())]

    def _count(self, func: Any, op: Op, args: Any, kwargs: Any, out: Any) -> None:
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, FakeTensor) and t.device.type == "cuda":
                self.see(t)
                if self.square and not op.is_view and sum(n >= self.square for n in t.shape) > 1:
                    self.squares[self.phase, f"{func.name()} {tuple(t.shape)} at {place()}"] += 1
        if op.copies:
            source, target = (args[0], out) if op.name == "_to_copy" else (args[1], args[0])
            if source.device.type != target.device.type:
                blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
                self.copies[self.phase, f"{source.device.type}->{target.device.type}"] += source.nbytes
                if blocks and source.device.type == "cuda":
                    self.wait()
        elif op.is_varlen:
            self.flops[self.phase] += self._varlen_flops(op, args)
        elif op.flops is not None:
            self.flops[self.phase] += op.flops(*args, **kwargs, out_val=out)

    def _varlen_flops(self, op: Op, args: Any) -> int:
        """Of causal attention: 2 products forward and 5 backward, over the pairs that see each other."""
        products, first = (5, 1) if "backward" in op.name else (2, 0)
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
            group = next(a for a in args if _is_group(a))
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


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _has_mask(indices: Any) -> bool:
    return any(_is_mask(i) for i in indices)
