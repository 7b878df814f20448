"""Ranks watch each other: one that gives no sign of life, or does not get on, ends the run on all ranks, with its name.

A thread of every rank writes its rank's sign (a counter, the phase of the main thread) to torch's store and reads that
of the next rank, in a ring: a read and a write a rank and period, whatever the world's size. The store is that of the
rendezvous, outside of the ranks under torchrun. What the thread can see and a collective's time-out cannot: which rank
it is, what it was doing, and ranks that wait without any time-out (vLLM's shared memory on CPU).

  silent     no new sign for `silence_s`: killed, stopped (SIGSTOP), or its machine is gone
  behind     its sign goes on, but it is in an earlier phase than its neighbour for `behind_s`: the main thread hangs

A rank that stops being watched before the others (generating ranks, when the trainer still saves) says so: it has left,
and is not missed.
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

EXIT_STATUS = 70  # of every rank, when one hangs


class Watch:
    """Of this rank. `phase` is called by the main thread, alike on all ranks; everything else happens in the thread.

    store: any that all ranks share; the thread needs a connection of its own, as the main one may wait in it.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world: int, silence_s: float, behind_s: float, side: str = ""
    ) -> None:
        """side: the phases of ranks are compared within one only."""
        self.store, self.rank, self.world = dist.PrefixStore("mrlhf/watch", store), rank, world
        self.silence_s, self.behind_s, self.side = silence_s, behind_s, side
        self.directory: Path | None = None  # where stacks are written, from when it is known
        self._phase = (0, "start-up")
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """The main thread begins `name`. The order of phases is the same on all ranks."""
        self._phase = (self._phase[0] + 1, name)
        self._since = time.monotonic()

    def stop(self) -> None:
        """Before an orderly end: the others may leave at any time from now on. Not collective."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self.side:
            with contextlib.suppress(dist.DistError):  # torchrun has gone too
                self.store.set(f"sign {self.rank}", self._sign(-1))

    def leave(self) -> None:
        """At Python's end, where nobody has called `stop`. The thread may wait for a machine that is out of reach: the
        end does not.
        """
        self._stopped.set()
        self._thread.join(2.0)

    def _sign(self, beats: int) -> str:
        who = {"side": self.side, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({"beats": beats, "phase": self._phase, "left": self._stopped.is_set(), **who})

    def _run(self) -> None:
        other, beats = (self.rank + 1) % self.world, 0
        period = min(5.0, self.silence_s / 5)
        last, last_new, behind_since = "", time.monotonic(), None
        while not self._stopped.is_set():
            try:
                self.store.set(f"sign {self.rank}", self._sign(beats))
                if self.store.check(["verdict"]):
                    self._end(self.store.get("verdict").decode(), told=True)
                sign = self.store.get(f"sign {other}").decode() if self.store.check([f"sign {other}"]) else ""
            except dist.DistError as error:
                if self._stopped.is_set():
                    return
                self._end(f"the rendezvous of torchrun does not answer any more ({str(error).splitlines()[0]})",
                          told=False)
            beats, now = beats + 1, time.monotonic()
            seen: dict[str, Any] = json.loads(sign) if sign else {"phase": (0, ""), "side": None, "left": False}
            if sign != last or seen["left"]:
                last, last_new = sign, now
            if now - last_new > self.silence_s:
                self._accuse(last, f"has given no sign of life for {now - last_new:.0f} s")
            # ahead of the neighbour: only then is the neighbour the one that others wait for
            if seen["side"] == self.side and not seen["left"] and seen["phase"][0] < self._phase[0]:
                behind_since = now if behind_since is None else behind_since
            else:
                behind_since = None
            if behind_since is not None and now - behind_since > self.behind_s:
                waited = f"has waited for it in '{self._phase[1]}' for {now - behind_since:.0f} s"
                self._accuse(last, f"does not get on: rank {self.rank} {waited}")
            self._stopped.wait(period)

    def _accuse(self, sign: str, what: str) -> None:
        unknown = {"host": "?", "pid": "?", "phase": (0, "start-up")}
        who, rank = json.loads(sign) if sign else unknown, (self.rank + 1) % self.world
        text = f"rank {rank} ({who['host']}, pid {who['pid']}) {what}; it was in '{who['phase'][1]}'"
        try:
            verdict = self.store.compare_set("verdict", "", text).decode()
        except dist.DistError:
            verdict = text
        self._end(verdict, told=verdict != text)

    def _end(self, verdict: str, *, told: bool) -> None:
        """Leaves without the main thread, which may wait for ever. `told`: another rank prints it."""
        where = ""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.directory / f"stacks_rank_{self.rank}.txt"
            with file.open("w") as f:
                faulthandler.dump_traceback(f, all_threads=True)
            where = f"\n  where every rank was: {self.directory}/stacks_rank_*.txt"
        if not told:
            bar = "=" * 100
            keys = "parallel.silence_seconds, parallel.timeout_minutes"
            fix = "look at that rank's machine; the same command resumes from the last checkpoint"
            text = f"RankProblem: {verdict}; all ranks end here ({keys}){where}\n  fix:      {fix}"
            sys.stderr.write(f"{bar}\n{text}\n{bar}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(EXIT_STATUS)


_current: Watch | None = None


def start(*, attempt: str, silence_s: float, behind_s: float, rank: int | None = None, world: int | None = None,
          side: str = "") -> None:
    """After init_process_group, in a world of more than one rank; once. The connection is to torchrun's own store;
    attempt: a name that no earlier ranks have used in it. rank, world: torchrun's, where they are not
    torch.distributed's."""
    global _current
    if _current is not None:
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, is_master=False,
                          wait_for_workers=False, timeout=datetime.timedelta(seconds=silence_s))
    rank, world = dist.get_rank() if rank is None else rank, dist.get_world_size() if world is None else world
    _current = Watch(dist.PrefixStore(attempt, store), rank=rank, world=world, silence_s=silence_s, behind_s=behind_s,
                     side=side)
    # A thread that returns from the store's C++ code while Python ends would abort the process.
    atexit.register(_current.leave)


def phase(name: str) -> None:
    """Says what the main thread does now; nothing in a world of one."""
    if _current is not None:
        _current.phase(name)


def log_to(directory: Path) -> None:
    """Where the stacks of all ranks are written when one hangs."""
    if _current is not None:
        _current.directory = directory


def stop() -> None:
    global _current
    if _current is not None:
        _current.stop()
        _current = None
