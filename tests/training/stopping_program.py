"""A Stopper in a process of its own for each case, signals sent to it, and what came of it. Prints a JSON."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from mrlhf.training import stopping
from mrlhf.training.stopping import Stopper

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
LONG = stopping._ECHO_S + 1.0


def start(program: Callable[[], None]) -> int:
    """A fork that does `program`, and ends with 0 where that comes to its end."""
    if (pid := os.fork()) == 0:
        program()
        os._exit(0)
    return pid


def stopper(*, steps: bool = True) -> Stopper:
    made = Stopper(budget_minutes=None, began=time.monotonic(), store=dist.HashStore(), rank=0)
    if steps:
        made.start_step()
    return made


def send(*signals: int, apart: float = LONG) -> None:
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(apart)


def requested(made: Stopper, reason: str | None) -> None:
    end = time.monotonic() + (10 if reason else 1)
    while not made.requested() and time.monotonic() < end:
        time.sleep(0.01)
    assert made.reason == (reason and f"{reason} (rank 0)"), made.reason


def one(number: int) -> Callable[[], None]:
    def program() -> None:
        made = stopper()
        send(number)
        requested(made, signal.Signals(number).name)

    return program


def before_the_first_step() -> None:
    stopper(steps=False)
    send(INT, apart=20)


def twice(second: int, *, apart: float = LONG) -> Callable[[], None]:
    def program() -> None:
        stopper()
        # a main thread that runs no Python, as in a collective, and a store that does not answer
        threading.Thread(target=send, args=(INT, second), kwargs={"apart": apart}).start()
        threading.Event().wait(8)

    return program


def store_hangs() -> None:
    made = stopper()
    made._store = type("Hanging", (), {"set": lambda *_: time.sleep(60)})()  # type: ignore[assignment]
    send(INT, INT, apart=LONG)


def sigterm_twice() -> None:
    made = stopper()
    send(TERM, TERM)
    requested(made, "SIGTERM")


def taken_by_a_library() -> None:
    made = stopper()
    signal.signal(INT, signal.default_int_handler)
    signal.signal(TERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    made.start_step()
    send(INT)
    requested(made, "SIGINT")


def a_fork_that_is_ended() -> None:
    """A tool of an environment, say, that a timeout ends by SIGTERM: that is not the run's."""
    made = stopper()
    if (pid := os.fork()) == 0:
        time.sleep(60)
    time.sleep(0.1)
    os.kill(pid, TERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -TERM
    requested(made, None)


def under_nohup() -> None:
    signal.signal(HUP, signal.SIG_IGN)
    made = stopper()
    send(HUP)
    requested(made, None)


if __name__ == "__main__":
    signal.signal(HUP, signal.SIG_DFL)
    cases = {
        "SIGINT": one(INT),
        "SIGTERM": one(TERM),
        "SIGHUP": one(HUP),
        "SIGTERM twice": sigterm_twice,
        "passed on": twice(INT, apart=0.02),
        "taken by a library": taken_by_a_library,
        "a fork": a_fork_that_is_ended,
        "nohup": under_nohup,
        "before the first step": before_the_first_step,
        "SIGINT twice": twice(INT),
        "SIGINT, SIGTERM": twice(TERM),
        "SIGINT twice, no store": store_hangs,
    }
    forks = {name: start(program) for name, program in cases.items()}
    ends = {name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in forks.items()}
    print("RESULT " + json.dumps(ends))
