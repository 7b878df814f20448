"""CUDA + NCCL where there is a GPU, CPU + gloo otherwise: chosen once, here.

Megatron-core has no CPU path: it writes `torch.cuda.current_device()` or `device="cuda"` in about 150
places. On CPU we give its modules, and nobody else's, another `torch`: a finder on `sys.meta_path` lets
every `megatron.core.*` module execute as usual and then rebinds that module's global name `torch` to a
facade, a module object that is torch in everything but
  * tensor factories, which map device "cuda" to "cpu" and drop pin_memory,
  * `torch.cuda`, a small namespace of no-op streams and events and of the CPU's random state.
Nothing in torch itself changes, except that `Tensor.type()` and `Tensor.cuda()` look at their caller and
answer differently inside megatron.core only. vLLM, transformers and user code see stock torch, on which
`torch.cuda.is_available()` is False. No cost per operation. With a GPU none of this is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import os
import queue
import sys
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from mrlhf.errors import EnvironmentProblem

MEGATRON_CORE = "0.16.1"
_PREFIX = "megatron.core"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Device:
    """`name` for torch tensors and `backend` for torch.distributed."""

    name: str
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    def describe(self) -> str:
        if self.is_cuda:
            return f"{torch.cuda.get_device_name()} (NCCL), torch {torch.__version__}, megatron-core {MEGATRON_CORE}"
        return f"CPU, {torch.get_num_threads()} threads a rank (gloo), torch {torch.__version__}, megatron-core {MEGATRON_CORE}"


@functools.lru_cache(maxsize=1)
def current() -> Device:
    """The device of this process. `MRLHF_DEVICE=cpu` forces the CPU on a machine with a GPU."""
    forced = os.environ.get("MRLHF_DEVICE", "")
    if forced not in ("", "cpu", "cuda"):
        raise EnvironmentProblem(f"MRLHF_DEVICE = {forced!r}", expected="cpu or cuda")
    if forced == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("MRLHF_DEVICE = cuda, and torch sees no GPU", fix="install a CUDA build of torch, or unset MRLHF_DEVICE")
    return Device("cuda", "nccl") if torch.cuda.is_available() and forced != "cpu" else Device("cpu", "gloo")


def check_megatron_version() -> None:
    """Raises EnvironmentProblem unless the installed megatron-core is the one this file was made for."""
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentProblem("megatron-core is not installed", fix=f"pip install megatron-core=={MEGATRON_CORE}") from error
    if found != MEGATRON_CORE:
        raise EnvironmentProblem(
            f"megatron-core {found} is installed; mrlhf is made for {MEGATRON_CORE}",
            expected=MEGATRON_CORE,
            fix=f"pip install megatron-core=={MEGATRON_CORE}",
        )


class _Nothing:
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


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


class _Cuda(types.ModuleType):
    """`torch.cuda` as megatron.core sees it on CPU; names not listed are the real ones."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        vars(self).update(
            is_available=lambda: False,
            is_initialized=lambda: True,
            current_device=lambda: _CPU,
            device_count=lambda: 1,
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda *args: _Nothing(),
            default_stream=lambda *args: _Nothing(),
            is_current_stream_capturing=lambda: False,
            Stream=_Nothing,
            Event=_Nothing,
            manual_seed=_seed,
            manual_seed_all=_seed,
            get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
            set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
            memory_stats=lambda *args: {},
            **{name: _ignore for name in ("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats")},
            **{name: _zero for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")},
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


_FACTORIES = (
    "arange as_tensor empty empty_like eye from_numpy full full_like linspace ones ones_like rand rand_like "
    "randint randn randn_like tensor zeros zeros_like"
).split()


def _cuda_to_cpu(device: Any) -> Any:
    return _CPU if device is not None and torch.device(device).type == "cuda" else device


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cuda_to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _Facade(types.ModuleType):
    """`torch` as megatron.core sees it on CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        vars(self).update({k: v for k, v in vars(torch).items() if k != "__getattr__"})
        vars(self).update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
        self.cuda = _Cuda()
        self.autocast = lambda device_type, *args, **kwargs: torch.autocast("cpu", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _called_by_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_PREFIX)


def _patch_tensor_methods() -> None:
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)  # type: ignore[arg-type]
        # optimizer.py and clip_grads.py compare with 'torch.cuda.FloatTensor'
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and _called_by_megatron() else answer

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = type_, cuda  # type: ignore[method-assign, assignment]


def _patch_module(module: types.ModuleType, facade: _Facade) -> None:
    """After `module` of megatron.core was executed."""
    name = module.__name__
    if vars(module).get("torch") is torch:
        module.torch = facade  # type: ignore[attr-defined]
    if name == f"{_PREFIX}.tensor_parallel.random":
        module._get_cuda_rng_state = facade.cuda.get_rng_state  # type: ignore[attr-defined]
        module._set_cuda_rng_state = facade.cuda.set_rng_state  # type: ignore[attr-defined]
        # On CPU the CPU generator is the generator: its change inside fork() is what is wanted.
        logging.getLogger(name).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    elif name == f"{_PREFIX}.transformer.moe.moe_utils":
        # without Transformer Engine the module never defines this name, which the router reads
        module.te_general_gemm = None  # type: ignore[attr-defined]
        move = module.maybe_move_tensor_to_cpu
        # all_to_all_single wants numbers for its sizes; Megatron converts only what comes from a GPU
        module.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (  # type: ignore[attr-defined]
            tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else move(tensor, as_numpy, record_stream)
        )
    elif name == f"{_PREFIX}.dist_checkpointing.mapping":
        init_data = module.ShardedTensor.init_data
        module.ShardedTensor.init_data = lambda self, device, *args, **kwargs: init_data(self, _cuda_to_cpu(device), *args, **kwargs)


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, facade: _Facade) -> None:
        self.inner, self.facade = inner, facade

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.inner.exec_module(module)
        _patch_module(module, self.facade)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, facade: _Facade) -> None:
        self.facade = facade

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith(_PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.facade)
        return spec


@functools.lru_cache(maxsize=1)
def adapt_megatron() -> None:
    """Make megatron.core importable on this machine; once, before its first import."""
    check_megatron_version()
    # "Transformer Engine and Apex are not installed", five times; `backends` says once what is used
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    if not current().is_cuda:
        already = [name for name in sys.modules if name == _PREFIX or name.startswith(_PREFIX + ".")]
        assert not already, f"megatron.core was imported before mrlhf.parallel: {already[:3]}"
        facade = _Facade()
        _patch_tensor_methods()
        sys.meta_path.insert(0, _Finder(facade))
        real_compile = torch.compile
        # megatron.core.jit captures torch.compile at import; compiling on CPU would start a C++ compiler
        torch.compile = lambda f=None, **kwargs: f if f is not None else (lambda g: g)  # type: ignore[assignment]
        try:
            import megatron.core.jit  # noqa: F401
        finally:
            torch.compile = real_compile
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Synchronous saves need no process-safe queue; Megatron would spawn a Manager process for it (4-10 s each run).
    filesystem_async._results_queue = queue.Queue()
