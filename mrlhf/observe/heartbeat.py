"""RUN/heartbeat/rank_N.json: every two seconds each rank writes its phase and step, for people and their scripts.

parallel/watch.py, not this file, ends a run that hangs. Stages use both through training/phases.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

INTERVAL_S = 2.0
_current: Heartbeat | None = None


def start_beating(run_dir: Path, *, rank: int) -> None:
    """Starts the thread that writes the file, until `stop_beating`."""
    global _current
    stop_beating()
    _current = Heartbeat(run_dir / "heartbeat", rank)
    _current.thread.start()


def stop_beating() -> None:
    """Ends the thread; does nothing without one."""
    global _current
    if _current is not None:
        _current.ended.set()
        _current.thread.join()
        _current = None


@contextlib.contextmanager
def in_phase(name: str, step: int) -> Iterator[None]:
    """The file names this phase inside the `with`, and the enclosing phase again after it."""
    beat = _current
    if beat is None:
        yield
        return
    before = beat.position
    beat.position = name, step, time.monotonic()
    try:
        yield
    finally:
        beat.position = before


class Heartbeat:
    """This rank's file and the thread that writes it. position: phase, step, and the time when the phase began."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.file, self.rank = directory / f"rank_{rank}.json", rank
        self.position = "start", 0, time.monotonic()
        self.ended = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self._write_beats, name="heartbeat", daemon=True)

    def _write_beats(self) -> None:
        while True:
            name, step, since = self.position
            beat = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "phase": name,
                    "seconds": round(time.monotonic() - since, 1), "time": time.time()}
            with contextlib.suppress(OSError):  # a full disk must not end a run
                self.file.write_text(json.dumps(beat))
            if self.ended.wait(INTERVAL_S):
                return
