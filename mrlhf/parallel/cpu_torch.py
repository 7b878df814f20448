"""The `torch` that megatron-core sees on a machine without GPU.

Megatron-core has no CPU path: it writes `torch.cuda.current_device()` or `device="cuda"` in about 150 places. `install`
puts a finder on `sys.meta_path`: each `megatron.core.*` module executes as usual, then its global name `torch` is bound
to a facade. The facade is torch in everything but
  * tensor factories, which map device "cuda" to "cpu" and drop pin_memory,
  * `torch.cuda`, a namespace of no-op streams and events and of the CPU's random state.
Torch itself changes in one respect: `Tensor.type()` and `Tensor.cuda()` look at their caller and answer differently
inside megatron.core. vLLM, transformers and user code see stock torch, on which `torch.cuda.is_available()` is False.
The facade costs nothing per operation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = (
    "arange as_tensor empty empty_like eye from_numpy full full_like linspace ones ones_like rand rand_like "
    "randint randn randn_like tensor zeros zeros_like"
).split()


class NoStream:
    """Stands for a CUDA stream or event: every method does nothing and returns the object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Cuda(types.ModuleType):
    """`torch.cuda` on CPU; names not listed here are the real ones."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        no_ops = ("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats")
        sizes = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
        vars(self).update(
            is_available=lambda: False, is_initialized=lambda: True, current_device=lambda: _CPU,
            device_count=lambda: 1, stream=lambda stream: contextlib.nullcontext(), current_stream=NoStream,
            default_stream=NoStream, is_current_stream_capturing=lambda: False, Stream=NoStream, Event=NoStream,
            manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)), get_rng_state=lambda *args,
            **kwargs: torch.get_rng_state(), set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
            memory_stats=lambda *args: {}, **{name: lambda *args, **kwargs: None for name in no_ops},
            **{name: lambda *args, **kwargs: 0 for name in sizes}
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def cuda_to_cpu(device: Any) -> Any:
    return _CPU if device is not None and torch.device(device).type == "cuda" else device


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = cuda_to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class Facade(types.ModuleType):
    """`torch` as megatron.core sees it."""

    def __init__(self) -> None:
        super().__init__("torch")
        vars(self).update({k: v for k, v in vars(torch).items() if k != "__getattr__"})
        vars(self).update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
        self.cuda = _Cuda()
        self.autocast = lambda device_type, *args, **kwargs: torch.autocast("cpu", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _called_by_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(PACKAGE)


def _patch_tensor_methods() -> None:
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)  # type: ignore[arg-type]
        if isinstance(answer, str) and _called_by_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)  # optimizer.py and clip_grads.py compare it
        return answer

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = type_, cuda  # type: ignore[method-assign, assignment]


AfterImport = Callable[[types.ModuleType, Facade], None]  # called with each module once it has executed


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, after_import: AfterImport) -> None:
        self.facade, self.after_import = Facade(), after_import

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                if vars(module).get("torch") is torch:
                    module.torch = self.facade  # type: ignore[attr-defined]
                self.after_import(module, self.facade)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(after_import: AfterImport) -> None:
    """Gives every module of megatron.core the facade; must run before the first of them is imported."""
    already = [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]
    assert not already, f"megatron.core was imported before mrlhf.parallel: {already[:3]}"
    _patch_tensor_methods()
    sys.meta_path.insert(0, _Finder(after_import))
