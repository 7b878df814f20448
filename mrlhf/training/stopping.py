"""Stops a run on a signal or at the end of its time budget, with a save and EXIT_STOPPED.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (SLURM's warning) end a run after the step. A second
Ctrl-C ends it at once, and so does the first before the first step, when nothing can be lost.

A signal may reach only one rank, while its main thread waits inside a collective, where Python runs no handler. So the
C-level handler writes to a pipe, a thread reads the pipe and sets a key in the job's store, and every rank reads that
key at its next safe point.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mrlhf.parallel import state

log = logging.getLogger(__name__)
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as of a command that Ctrl-C ends
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_ECHO_S = 0.3  # a launcher may pass on the Ctrl-C that the rank has got from the terminal too
_KEY = "mrlhf/stop"
_POLL_S = 0.5


class Interrupted(Exception):
    """A stop request interrupted a step. Nothing has changed since the step before."""


class Stopper:
    """Decides whether the run stops, and why. One per process, made in its main thread after torch.distributed started.

    budget_minutes: wall-clock time, counted from `began` (time.monotonic()); None: no limit. store, rank: shared by all
    ranks that must learn of a signal, if they are more than torch.distributed's world (parallel/split.py).
    """

    def __init__(self, *, budget_minutes: float | None, began: float, store: dist.Store | None = None,
                 rank: int | None = None) -> None:
        self.reason: str | None = None
        self._deadline = None if budget_minutes is None else began + 60 * budget_minutes
        self._store = distributed_c10d._get_default_store() if store is None else store
        self._rank = dist.get_rank() if rank is None else rank
        self._last_poll = 0.0
        self._steps_began = False
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        # nohup ignores SIGHUP on purpose
        self._signals = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._take_signals()
        os.register_at_fork(after_in_child=self._leave_signals)
        threading.Thread(target=self._forward_signals, args=(reader,), name="signals", daemon=True).start()

    def _take_signals(self) -> None:
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        for number in self._signals:
            signal.signal(number, lambda *_: None)  # the default action would end the process

    def _leave_signals(self) -> None:
        """In a forked child, whose signals must not reach this rank's pipe."""
        signal.set_wakeup_fd(-1)
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)

    def start_step(self) -> None:
        """Before each step. Takes the signals again, which a library (vLLM, asyncio) may have taken meanwhile."""
        self._steps_began = True
        self._take_signals()

    def _forward_signals(self, reader: int) -> None:
        """The thread: writes the signals of this rank into the store, or ends the process at once."""
        interrupted: float | None = None
        while data := os.read(reader, 1):
            number, now = data[0], time.monotonic()
            if number not in self._signals:
                continue
            # torchrun answers a second Ctrl-C with SIGTERM to the ranks
            may_end = number in (signal.SIGINT, signal.SIGTERM)
            again = may_end and interrupted is not None and now - interrupted > _ECHO_S
            if again or (number == signal.SIGINT and not self._steps_began):
                try:
                    os.write(2, b"interrupted: left at once, without a save\n" if again else b"interrupted\n")
                finally:  # the terminal may be gone
                    os._exit(EXIT_INTERRUPTED)
            name = signal.Signals(number).name
            if number == signal.SIGINT and interrupted is None:
                interrupted = now
                log.info("SIGINT: the run ends after this step, with a save; a second Ctrl-C ends it at once, without")
            # in a thread of its own: the store may be busy or gone, and a second Ctrl-C must still be read
            threading.Thread(target=self._store.set, args=(_KEY, f"{name} (rank {self._rank})"), daemon=True).start()

    def requested(self) -> bool:
        """True once any rank got a signal. Not collective; reads the store at most twice a second."""
        now = time.monotonic()
        if self.reason is None and now - self._last_poll >= _POLL_S:
            self._last_poll = now
            if self._store.check([_KEY]):
                self.reason = self._store.get(_KEY).decode()
        return self.reason is not None

    def message(self, step: int) -> str:
        """The last line of a stopped run."""
        return f"stopped by {self.reason} after step {step}: the same command continues the run (status {EXIT_STOPPED})"

    def agree_to_stop(self, *, next_s: float = 0.0) -> bool:
        """Whether all ranks stop now. next_s: expected seconds of the next step and a save. Collective."""
        late = self._deadline is not None and state.is_main() and time.monotonic() + next_s > self._deadline
        self._last_poll = 0.0
        wanted = torch.tensor([float(self.requested()), float(late)])  # on the host, so over gloo
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        if wanted[0]:
            while not self.requested():  # another rank has read the key already
                time.sleep(_POLL_S)
        elif wanted[1]:
            self.reason = "train.exit_duration_minutes"
            self._store.set(_KEY, self.reason)  # for the generating ranks
        return bool(wanted.any())
