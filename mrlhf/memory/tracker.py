"""Memory peaks of a run's phases, and the error of a rank that runs out of memory.

torch, Python and NumPy each report "out of memory" in their own ways. Inside a phase each becomes an `OutOfMemory` with
rank, phase, the requested size, the peaks of all phases so far, and options that reduce memory (advice.py). It
propagates like any error: the step is not counted, logged or saved. The other ranks end as for any lost rank. No
process can report the kernel's OOM killer.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from mrlhf.config.options import TrainingConfig
from mrlhf.errors import OutOfMemory
from mrlhf.memory.advice import remedies
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel import device

_PROC = Path("/proc/self")
_PACKAGE = Path(__file__).parents[1]
_TEXTS = (
    "out of memory",  # CUDA, NCCL
    "can't allocate memory",  # DefaultCPUAllocator
    "not enough memory",  # DefaultCPUAllocator, for more than the address space
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"(?:tr(?:ied|ying) to|unable to) allocate ([\d.]+) ?(bytes|[KMGTPE]iB)?", re.IGNORECASE)
_FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def _reset_peak() -> None:
    if device.current().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # without the file (some sandboxes) peaks are those of the whole run
            (_PROC / "clear_refs").write_text("5")


def _peaks_gib() -> tuple[float, float]:
    """(allocated, reserved) peaks since the last reset, in GiB. On CPU both are the largest resident size."""
    if device.current().is_cuda:
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    if sys.platform == "linux":
        line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) / 2**20
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # of the whole run; macOS counts in bytes
    return peak, peak


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def requested_memory(text: str) -> str:
    """Reads the requested and the free memory from an error's message."""
    asked, free = _ASKED.search(text), _FREE.search(text)
    parts = []
    if asked:
        number, unit = float(asked[1].rstrip(".")), asked[2] or "bytes"
        if unit.lower() == "bytes":
            power = min(5, max(0, (int(number).bit_length() - 1) // 10))
            number, unit = number / 1024**power, ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")[power]
        parts.append(f"{number:.4g} {unit} more were requested")
    if free:
        parts.append(f"{free[2]} of {free[1]} are free")
    return ", ".join(parts) or "the requested size is unknown"


def _innermost_frame(error: BaseException) -> str:
    """file:line of the innermost frame in this package."""
    lines = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
    return f"{Path(lines[-1].filename).relative_to(_PACKAGE.parent)}:{lines[-1].lineno}"


def phase_label(name: str, step: int | None) -> str:
    """The name of a phase in messages: "build", "step 3", "save of step 3"."""
    return name if step is None else f"step {step}" if name == "step" else f"{name} of step {step}"


class Memory:
    """`with memory("step", 3): ...` around every phase of a run. world: the number of training ranks."""

    def __init__(self, config: TrainingConfig, *, spec: ModelSpec, rank: int, world: int) -> None:
        self.config, self.spec, self.rank, self.world = config, spec, rank, world
        self.peaks: dict[str, float] = {}  # GiB of each phase, over the run so far
        self.last_peak = self.reserved = 0.0  # GiB: peak of the last phase; largest reservation of the run
        self.device_peak = 0.0  # GiB in use on the card, see sample_device; the reader resets it
        self._hidden = self._hidden_all_phase = 0.0  # GiB, see hide

    @contextlib.contextmanager
    def __call__(self, phase: str, step: int | None = None) -> Iterator[None]:
        """Raises OutOfMemory instead of every error that reports exhausted memory."""
        _reset_peak()
        self._hidden_all_phase = self._hidden
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._record_peak(phase)
            raise self._out_of_memory(error, phase, step) from error
        self._record_peak(phase)

    def hide(self, freed: int) -> None:
        """vLLM sleeps, and has returned `freed` bytes that torch still counts as allocated; 0: it is awake."""
        self._hidden = freed / 2**30
        self._hidden_all_phase = min(self._hidden_all_phase, self._hidden)

    def sample_device(self) -> None:
        """Before memory returns to the driver, and at the end of a phase: what all libraries hold of the card, vLLM's
        pool, CUDA graphs and NCCL's buffers included. torch's own cache does not shrink in between.
        """
        if device.current().is_cuda:
            free, total = torch.cuda.mem_get_info()
            self.device_peak = max(self.device_peak, (total - free) / 2**30)

    def _record_peak(self, phase: str) -> None:
        allocated, reserved = (peak - self._hidden_all_phase for peak in _peaks_gib())
        self.last_peak = allocated
        self.sample_device()
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), self.last_peak)
        self.reserved = max(self.reserved, reserved)

    def _out_of_memory(self, error: BaseException, phase: str, step: int | None) -> OutOfMemory:
        here = device.current()
        name = f"cuda:{torch.cuda.current_device()}" if here.is_cuda else "CPU"
        where, request = f"rank {self.rank} ({name})", requested_memory(str(error))
        return OutOfMemory(
            f"{where} is out of memory in '{phase_label(phase, step)}': {request} (at {_innermost_frame(error)})",
            peaks=self.peaks,
            remedies=remedies(self.config, phase, spec=self.spec, world=self.world, cuda=here.is_cuda),
        )
