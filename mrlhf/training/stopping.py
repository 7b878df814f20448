"""Leaving a run in time: SIGTERM, SIGUSR1 (SLURM's warning) and the wall-clock budget. The run saves and exits with
EXIT_STOPPED.

A signal may come to one rank, and while its main thread waits inside a collective, where Python runs no handler. So the
C-level handler writes to a pipe, a thread reads it and sets a key in the job's store, and every rank sees that key at
its next safe place.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mrlhf.parallel import device, state

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_KEY = "mrlhf/stop"
_POLL_S = 0.5


class Interrupted(Exception):
    """A step was left because the run is to stop; nothing has changed since the step before."""


class Stopper:
    """Whether the run is to stop, and why. Made once a process, in its main thread, after torch.distributed was
    started.

    budget_minutes: of wall-clock time from `began` (time.monotonic()) on; None: no limit. store, rank: of all that must
    hear of a signal, where that is not torch.distributed's world (parallel/split.py).
    """

    def __init__(self, *, budget_minutes: float | None, began: float, store: dist.Store | None = None,
                 rank: int | None = None) -> None:
        self.reason: str | None = None
        self._deadline = None if budget_minutes is None else began + 60 * budget_minutes
        self._store = distributed_c10d._get_default_store() if store is None else store
        self._rank = dist.get_rank() if rank is None else rank
        self._looked = 0.0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # or the default action would end the process
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def _watch(self, reader: int) -> None:
        while data := os.read(reader, 1):
            if data[0] in _SIGNALS:
                name = signal.Signals(data[0]).name
                self._store.set(_KEY, f"{name} (rank {self._rank})")

    def requested(self) -> bool:
        """Not collective: this rank knows of a signal to any rank. Asks the store at most twice a second."""
        now = time.monotonic()
        if self.reason is None and now - self._looked >= _POLL_S:
            self._looked = now
            if self._store.check([_KEY]):
                self.reason = self._store.get(_KEY).decode()
        return self.reason is not None

    def describe(self, step: int) -> str:
        return f"stopped by {self.reason} after step {step}: the same command again goes on (status {EXIT_STOPPED})"

    def agreed(self, *, next_s: float = 0.0) -> bool:
        """Collective: the same answer on all ranks. next_s: seconds that the next step and a save will take, for the
        budget.
        """
        late = self._deadline is not None and state.is_main() and time.monotonic() + next_s > self._deadline
        self._looked = 0.0
        wanted = torch.tensor([float(self.requested()), float(late)], device=device.current().name)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        if wanted[0]:
            while not self.requested():  # another rank has seen the key already
                time.sleep(_POLL_S)
        elif wanted[1]:
            self.reason = "train.exit_duration_minutes"
            self._store.set(_KEY, self.reason)  # for ranks that generate ahead
        return bool(wanted.any())
