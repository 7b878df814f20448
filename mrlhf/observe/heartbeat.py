"""RUN/heartbeat/rank_N.json: every rank says every two seconds where it is, for people and their scripts
(parallel/watch.py ends what hangs).
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


def start(run_dir: Path, *, rank: int) -> None:
    """From now on; `stop` ends it."""
    global _current
    stop()
    _current = Heartbeat(run_dir / "heartbeat", rank)
    _current.thread.start()


def stop() -> None:
    global _current
    if _current is not None:
        _current.ended.set()
        _current.thread.join()
        _current = None


@contextlib.contextmanager
def phase(name: str, step: int) -> Iterator[None]:
    """What the main thread does meanwhile; the phase around it comes back afterwards."""
    beat = _current
    if beat is None:
        yield
        return
    before = beat.now
    beat.now = name, step, time.monotonic()
    try:
        yield
    finally:
        beat.now = before


class Heartbeat:
    def __init__(self, directory: Path, rank: int) -> None:
        self.file, self.rank = directory / f"rank_{rank}.json", rank
        self.now = "start", 0, time.monotonic()
        self.ended = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def _run(self) -> None:
        while True:
            name, step, since = self.now
            beat = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "phase": name,
                    "seconds": round(time.monotonic() - since, 1), "time": time.time()}
            with contextlib.suppress(OSError):  # a full disk is no reason to end a run
                self.file.write_text(json.dumps(beat))
            if self.ended.wait(INTERVAL_S):
                return
