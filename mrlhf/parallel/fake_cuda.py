"""A CUDA device and a world of ranks that do not exist, for torch in this process.

Fake tensors (torch's FakeTensorMode) have shape, dtype and device, but no memory. What torch itself lacks for them
where there is no GPU is here:
  * a device guard for CUDA, which autograd asks for (only on a build of torch for the CPU, which has none),
  * `torch.cuda` with one device, streams and events that do nothing, and the meter's numbers as its memory,
  * process groups of torch's "fake" backend whatever the caller names; collectives of objects answer with this rank's
    own object,
  * the kernels that a GPU would take, where fake tensors would take several others (`Kernels`).
`install` is for a process that does nothing else: parallel/device.py calls it for MRLHF_DEVICE=rehearsal.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from mrlhf.parallel import meter
from mrlhf.parallel.cpu_torch import NoStream

CARD, CARD_BYTES, CAPABILITY = "rehearsed H100", 85_029_158_912, (9, 0)
_keep_alive: list[Any] = []  # C++ holds pointers to these


def _add_device_guard() -> None:
    """Puts torch's own guard without devices, and hooks that say "CUDA is built", into its registries.

    A build for CUDA has both on every machine. On one for the CPU autograd raises without them.
    """
    if torch.cuda._is_compiled():
        return
    libraries, cuda = Path(torch.__file__).parent / "lib", 1  # c10::DeviceType
    c10, cpu = (ctypes.CDLL(str(libraries / name)) for name in ("libc10.so", "libtorch_cpu.so"))
    guards = (ctypes.c_void_p * 20).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[cuda]:
        return
    # torch replaces a guard that counts 0 devices by one without devices: any virtual function of this one gives 0
    zero = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    guards[cuda] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[cuda] != ctypes.addressof(guard), "torch kept the guard"
    hooks_of = cpu._ZN2at6detail12getCUDAHooksEv
    hooks_of.restype = ctypes.c_void_p
    hooks = ctypes.cast(hooks_of(), ctypes.POINTER(ctypes.c_void_p))
    # a copy of the table of virtual functions, with the two words before it, in which two answer yes
    words, before = 128, 2
    assert hooks[0] is not None
    table = (ctypes.c_void_p * words).from_buffer_copy((ctypes.c_void_p * words).from_address(hooks[0] - 8 * before))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    for slot in (2, 4):  # isBuilt, hasPrimaryContext; 0 and 1 are destructors
        table[before + slot] = ctypes.cast(yes, ctypes.c_void_p).value
    real, hooks[0] = hooks[0], ctypes.addressof(table) + 8 * before
    atexit.register(hooks.__setitem__, 0, real)  # C++ asks again when Python has gone
    _keep_alive.extend([zero, methods, guard, table, yes])


def _add_kernels() -> None:
    """Operations that a GPU has a kernel for; a build for the CPU would put each together from several others."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", lambda grad, x: torch.empty_like(grad), "CUDA")
    _keep_alive.append(library)


class _Idle(NoStream):
    """A stream or an event of the device that does not exist."""

    device, cuda_stream = torch.device("cuda", 0), 0

    def synchronize(self) -> None:
        meter.current().wait()


def _give(value: Any = None) -> Callable[..., Any]:
    """A new function each time: torch._dynamo, which transformers imports, refuses one under two names."""
    return lambda *args, **kwargs: value


def _measure(read: Callable[[meter.Meter], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: read(meter.current())


def _replace_cuda(devices: int) -> None:
    properties = types.SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=CARD_BYTES, name=CARD,
                                       multi_processor_count=132, gcnArchName="", uuid="rehearsal")
    randomness = dict(manual_seed=_give(), manual_seed_all=_give(), set_rng_state=_give(),
                      get_rng_state=lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8))
    no_ops = "set_device empty_cache ipc_collect set_stream _lazy_init _lazy_call".split()
    vars(torch.cuda).update(
        is_available=_give(True), is_initialized=_give(False), current_device=_give(0), device_count=_give(devices),
        is_current_stream_capturing=_give(False), get_device_name=_give(CARD), get_device_capability=_give(CAPABILITY),
        get_device_properties=_give(properties), Stream=_Idle, Event=_Idle, current_stream=lambda *args: _Idle(),
        default_stream=lambda *args: _Idle(), stream=lambda stream: contextlib.nullcontext(),
        default_generators=[torch.default_generator], synchronize=_measure(lambda m: m.wait()),
        memory_stats=lambda *args: {}, reset_peak_memory_stats=_measure(lambda m: m.reset_peak()),
        mem_get_info=_measure(lambda m: (CARD_BYTES - m.live, CARD_BYTES)),
        **{f"memory_{kind}": _measure(lambda m: m.live) for kind in ("allocated", "reserved")},
        **{f"max_memory_{kind}": _measure(lambda m: m.peak) for kind in ("allocated", "reserved")},
        **{name: _give() for name in no_ops}, **randomness,
    )
    vars(torch.cuda.random).update(randomness)


def _replace_groups() -> None:
    real_group = dist.new_group

    @functools.wraps(real_group)
    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None,
                  **rest: Any) -> Any:
        return real_group(ranks, backend="fake", **rest)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(*args: Any, **kwargs: Any) -> None:
        pass

    def scatter_object_list(scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None,
                            *args: Any, **kwargs: Any) -> None:
        if scatter_object_input_list is not None:
            scatter_object_output_list[0] = scatter_object_input_list[0]

    for module in (dist, dist.distributed_c10d):
        vars(module).update(new_group=new_group, all_gather_object=all_gather_object, gather_object=gather_object,
                            broadcast_object_list=broadcast_object_list, scatter_object_list=scatter_object_list)


@functools.cache
def install(devices: int = 8) -> None:
    """For the rest of this process. devices: of this machine."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    _add_device_guard()
    _add_kernels()
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]
    _replace_cuda(devices)
    _replace_groups()


def _is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor) and x.device.type == "cuda"


class _RMSNorm(torch.autograd.Function):
    """CUDA's fused kernel: keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device))
        if weight is not None and weight.dtype != x.dtype:
            raise RuntimeError(f"rms_norm mixes {x.dtype} and {weight.dtype}")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _attention(real: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> torch.Tensor:
    """The kernel that torch would choose on the device: flash, else memory-efficient, else plain products."""
    aten = torch.ops.aten
    half, grouped = q.dtype in (torch.bfloat16, torch.float16), q.size(1) != k.size(1)
    aligned = q.size(-1) % 8 == v.size(-1) % 8 == 0
    if half and attn_mask is None and aligned and q.size(-1) == v.size(-1) <= 256:
        options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        return aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]
    if not grouped and aligned:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.size(2))
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), dropout_p,
                                                            is_causal, scale=scale)[0]
    return real(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa)


class Kernels(TorchFunctionMode):
    """Calls of torch from Python that fake CUDA tensors would answer otherwise than real ones, or not at all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_fake(args[0]):
            return _attention(func, *args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm) and _is_fake(args[0]):
            return _RMSNorm.apply(args[0], kwargs.get("weight", args[2] if len(args) > 2 else None))
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            assert args[0].device.type == "cpu", "numpy() of a CUDA tensor"
            return np.array(meter.current().read(args[0]))
        if func is torch.tensor and args and isinstance(args[0], (list, tuple)):
            args = (_numbers(args[0]), *args[1:])  # C++ would ask each for its value
        return func(*args, **kwargs)


def _numbers(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_numbers(x) for x in data]
    return data.item() if isinstance(data, FakeTensor) else data


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, which would swap a parameter's contents; what the fake mode remembers of it forbids that."""
    for module in self.modules() if recurse else [self]:
        for name, p in module._parameters.items():
            if p is None:
                continue
            moved = fn(p.detach())
            if (moved.device, moved.dtype) != (p.device, p.dtype):
                made = torch.nn.Parameter(moved, p.requires_grad)
                marks = {key: value for key, value in vars(p).items() if key not in vars(made)}
                vars(made).update(marks)
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Methods of torch's classes that know nothing of fake tensors."""
    storage, resize, device_of = torch.UntypedStorage, torch.UntypedStorage.resize_, torch.UntypedStorage.device

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        out = resize(self, size)
        meter.current().resized(self)
        return out

    def device(self: torch.UntypedStorage) -> torch.device:  # that of a fake tensor is "meta"
        where = device_of.__get__(self)  # type: ignore[attr-defined]
        return torch.device("cuda", 0) if where.type == "meta" and meter.current().owns(self) else where

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (storage, "resize_", resize_), (storage, "device", property(device)), (torch.nn.Module, "_apply", _apply),
            (FakeTensor, "tolist", lambda self: meter.current().read(self)),
            (torch.Tensor, "record_stream", lambda self, stream: None),
            # else backward() is one call for `Kernels`, which then sees nothing inside of it (recomputation)
            (torch.autograd, "has_torch_function", lambda arguments: False),
            (torch, "Generator", lambda device="cpu", real=torch.Generator: real()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def start_world(rank: int, world: int) -> None:
    """The default process group: rank `rank` of `world`, alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    # names of groups count up from here, so that two replayed ranks give a group one name
    dist.distributed_c10d._world.group_count = 0
    hook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    sys.excepthook = hook  # each start of a group would put one more "[rank0]" before a traceback's lines
