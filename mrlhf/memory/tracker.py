"""How much memory the phases of a run had, and the error of a rank that has none left.

torch says "out of memory" in several ways, Python and NumPy in others; inside a phase each becomes an `OutOfMemory`:
rank, phase, what was asked for, the peaks of all phases so far, and the keys that would need less (less_memory.py). It
comes up like any error: no step is counted, logged or saved. The other ranks end as for any rank that is lost. What no
process can report is the kernel's own killer.
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
    "not enough memory",  # the same where it asks for more than can be addressed
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"(?:tr(?:ied|ying) to|unable to) allocate ([\d.]+) ?(bytes|[KMGTPE]iB)?", re.IGNORECASE)
_FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def _reset_peak() -> None:
    if device.current().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may not have it: the peaks are then those of the run so far
            (_PROC / "clear_refs").write_text("5")


def _peaks_gib() -> tuple[float, float]:
    """Since the last reset: (memory of tensors on the device, memory reserved for them); on CPU twice the largest
    resident size.
    """
    if device.current().is_cuda:
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    if sys.platform == "linux":
        line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) / 2**20
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # of the whole run: bytes on macOS
    return peak, peak


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def what_was_asked(text: str) -> str:
    """From the message of whoever has no memory: how much more it was, and what the device has."""
    asked, free = _ASKED.search(text), _FREE.search(text)
    parts = []
    if asked:
        number, unit = float(asked[1].rstrip(".")), asked[2] or "bytes"
        if unit.lower() == "bytes":
            power = min(5, max(0, (int(number).bit_length() - 1) // 10))
            parts.append(
                f"{number / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]} more were asked for"
            )
        else:
            parts.append(f"{number:.4g} {unit} more were asked for")
    if free:
        parts.append(f"{free[2]} of {free[1]} are free")
    return ", ".join(parts) or "how much was asked for is not known"


def _place(error: BaseException) -> str:
    """The innermost line of ours that it passed through."""
    lines = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_PACKAGE)]
    return f"{Path(lines[-1].filename).relative_to(_PACKAGE.parent)}:{lines[-1].lineno}"


def phase_label(name: str, step: int | None) -> str:
    """What messages call a phase: "build", "step 3", "save of step 3"."""
    return name if step is None else f"step {step}" if name == "step" else f"{name} of step {step}"


class Memory:
    """`with memory("step", 3): ...` around everything of a run that needs memory. config: of a training stage; world:
    its ranks.
    """

    def __init__(self, config: TrainingConfig, *, spec: ModelSpec, rank: int, world: int) -> None:
        self.config, self.spec, self.rank, self.world = config, spec, rank, world
        self.peaks: dict[str, float] = {}  # GiB of each phase, over the run so far
        self.last = self.reserved = 0.0  # GiB: the peak of the phase that ended last; the largest reserved so far

    @contextlib.contextmanager
    def __call__(self, phase: str, step: int | None = None) -> Iterator[None]:
        """Raises OutOfMemory for whatever says that memory is out."""
        _reset_peak()
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._note(phase)
            raise self._error(error, phase, step) from error
        self._note(phase)

    def _note(self, phase: str) -> None:
        self.last, reserved = _peaks_gib()
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), self.last)
        self.reserved = max(self.reserved, reserved)

    def _error(self, error: BaseException, phase: str, step: int | None) -> OutOfMemory:
        here = device.current()
        name = f"cuda:{torch.cuda.current_device()}" if here.is_cuda else "CPU"
        where, request = f"rank {self.rank} ({name})", what_was_asked(str(error))
        return OutOfMemory(
            f"{where} is out of memory in '{phase_label(phase, step)}': {request} (at {_place(error)})",
            peaks=self.peaks,
            remedies=remedies(self.config, phase, spec=self.spec, world=self.world, cuda=here.is_cuda),
        )
