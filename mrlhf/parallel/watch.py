"""Ranks watch each other. When a rank is lost or hangs, all ranks end with an error that names it.

A thread on every rank writes its rank's sign (a counter, the phase of the main thread) to torch's store and reads the
sign of the next rank, in a ring: one read and one write per rank and period, whatever the world size. Under torchrun
the store belongs to the rendezvous, outside of the ranks. A collective's time-out does not tell which rank is lost or
what it was doing, and it misses ranks that wait without a time-out (vLLM's shared memory on CPU). The thread sees all
three.

  silent     no new sign for `silence_s`: the rank was killed or stopped (SIGSTOP), or its machine is gone
  behind     new signs, but for `behind_s` an earlier phase than its neighbour's: the main thread hangs

A rank that ends before the others (a generating rank, while the trainer still saves) sets `left` in its last sign, and
its neighbour stops watching it.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

EXIT_STATUS = 70  # every rank exits with it when one rank is lost or hangs


class Watch:
    """Watches the next rank, in a thread. The main thread calls `set_phase`, in the same order on all ranks.

    store: shared by all ranks. The thread needs its own connection, since the main thread may block in another one.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world: int, silence_s: float, behind_s: float, side: str = ""
    ) -> None:
        """side: only ranks of the same side have comparable phases."""
        self.store, self.rank, self.world = dist.PrefixStore("mrlhf/watch", store), rank, world
        self.silence_s, self.behind_s, self.side = silence_s, behind_s, side
        self.directory: Path | None = None  # for the stacks, once the run's directory is known
        self._phase = (0, "start-up")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch_next_rank, name="watch", daemon=True)
        self._thread.start()

    def set_phase(self, name: str) -> None:
        """The main thread enters `name`. The order of phases is the same on all ranks."""
        self._phase = (self._phase[0] + 1, name)

    def stop_watch(self) -> None:
        """Ends the watch in an orderly way: from now on the other ranks may leave at any time. Not collective."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self.side:
            with contextlib.suppress(dist.DistError):  # torchrun has ended too
                self.store.set(f"sign {self.rank}", self._sign(-1))

    def end_thread(self) -> None:
        """Ends the thread at Python's exit. Waits at most 2 s, since the thread may wait for an unreachable machine."""
        self._stopped.set()
        self._thread.join(2.0)

    def _sign(self, beats: int) -> str:
        who = {"side": self.side, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({"beats": beats, "phase": self._phase, "left": self._stopped.is_set(), **who})

    def _watch_next_rank(self) -> None:
        other, beats = (self.rank + 1) % self.world, 0
        period = min(5.0, self.silence_s / 5)
        last, last_new, behind_since = "", time.monotonic(), None
        while not self._stopped.is_set():
            try:
                self.store.set(f"sign {self.rank}", self._sign(beats))
                if self.store.check(["verdict"]):
                    self._end_process(self.store.get("verdict").decode(), reported=True)
                sign = self.store.get(f"sign {other}").decode() if self.store.check([f"sign {other}"]) else ""
            except dist.DistError as error:
                if self._stopped.is_set():
                    return
                self._end_process(f"the rendezvous of torchrun does not answer any more ({str(error).splitlines()[0]})",
                                  reported=False)
            beats, now = beats + 1, time.monotonic()
            seen: dict[str, Any] = json.loads(sign) if sign else {"phase": (0, ""), "side": None, "left": False}
            if sign != last or seen["left"]:
                last, last_new = sign, now
            if now - last_new > self.silence_s:
                self._report_next_rank(last, f"has given no sign of life for {now - last_new:.0f} s")
            # Other ranks wait for the neighbour only if it is in an earlier phase than this rank.
            if seen["side"] == self.side and not seen["left"] and seen["phase"][0] < self._phase[0]:
                behind_since = now if behind_since is None else behind_since
            else:
                behind_since = None
            if behind_since is not None and now - behind_since > self.behind_s:
                waited = f"has waited for it in '{self._phase[1]}' for {now - behind_since:.0f} s"
                self._report_next_rank(last, f"makes no progress: rank {self.rank} {waited}")
            self._stopped.wait(period)

    def _report_next_rank(self, sign: str, what: str) -> None:
        """Ends this process, and all others by the verdict in the store. The first rank's verdict counts."""
        unknown = {"host": "?", "pid": "?", "phase": (0, "start-up")}
        who, rank = json.loads(sign) if sign else unknown, (self.rank + 1) % self.world
        text = f"rank {rank} ({who['host']}, pid {who['pid']}) {what}; it was in '{who['phase'][1]}'"
        try:
            verdict = self.store.compare_set("verdict", "", text).decode()
        except dist.DistError:
            verdict = text
        self._end_process(verdict, reported=verdict != text)

    def _end_process(self, verdict: str, *, reported: bool) -> None:
        """Exits without the main thread, which may wait for ever. reported: another rank prints the verdict."""
        where = ""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.directory / f"stacks_rank_{self.rank}.txt"
            with file.open("w") as f:
                faulthandler.dump_traceback(f, all_threads=True)
            where = f"\n  where every rank was: {self.directory}/stacks_rank_*.txt"
        if not reported:
            bar = "=" * 100
            keys = "parallel.silence_seconds, parallel.timeout_minutes"
            fix = "look at that rank's machine; the same command resumes a run from its last checkpoint"
            problem = f"RankProblem: {verdict}; all ranks end here ({keys}){where}"
            sys.stderr.write(f"{bar}\n{problem}\n  fix:      {fix}\n{bar}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(EXIT_STATUS)


_current: Watch | None = None


def start_watch(*, attempt: str, silence_s: float, behind_s: float, rank: int | None = None, world: int | None = None,
                side: str = "") -> None:
    """Starts this process's watch, after init_process_group in a world of several ranks. Further calls do nothing.

    It connects to torchrun's own store. attempt: a name that no earlier attempt used in this store. rank, world: those
    of torchrun, if they differ from torch.distributed's.
    """
    global _current
    if _current is not None:
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, is_master=False,
                          wait_for_workers=False, timeout=datetime.timedelta(seconds=silence_s))
    rank, world = dist.get_rank() if rank is None else rank, dist.get_world_size() if world is None else world
    _current = Watch(dist.PrefixStore(attempt, store), rank=rank, world=world, silence_s=silence_s, behind_s=behind_s,
                     side=side)
    # A thread that returns from the store's C++ code while Python shuts down would abort the process.
    atexit.register(_current.end_thread)


def set_phase(name: str) -> None:
    """The main thread enters `name`. Does nothing in a world of one rank."""
    if _current is not None:
        _current.set_phase(name)


def write_stacks_to(directory: Path) -> None:
    """Sets the directory for the stacks that all ranks write when one hangs."""
    if _current is not None:
        _current.directory = directory


def stop_watch() -> None:
    """Ends this process's watch; see `Watch.stop_watch`."""
    global _current
    if _current is not None:
        _current.stop_watch()
        _current = None
