"""A rank that is stopped, killed or hangs: all the others end within the time-out, one of them naming it.
One that is only slow does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT, TESTS, environment

from mrlhf.parallel.watch import EXIT_STATUS

WORLD = 3
Ranks = list[subprocess.Popen[str]]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    command = [sys.executable, TESTS / "parallel/watch_program.py"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(store.port), tmp_path / "logs"],
            cwd=ROOT,
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(WORLD)
    ]
    try:
        assert [p.stdout.readline() for p in started] == ["ready\n"] * WORLD
        yield started
    finally:
        for p in started:
            p.kill()
            p.communicate()


def tell(ranks: Ranks, order: str) -> None:
    for p in ranks:
        print(order, file=p.stdin, flush=True)


def verdict(ranks: Ranks) -> str:
    """What the ranks have printed, when all have ended by themselves."""
    outputs = [p.communicate(timeout=20)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [EXIT_STATUS] * len(ranks), outputs
    said = [text for text in outputs if "RankProblem" in text]
    assert len(said) == 1, "said once"
    return said[0]


@pytest.mark.parametrize("sign", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_rank_is_named_by_the_others(ranks: Ranks, tmp_path: Path, sign: signal.Signals) -> None:
    tell(ranks, "go on")
    assert [p.stdout.readline() for p in ranks] == ["third\n"] * WORLD
    time.sleep(1.0)  # for a sign
    os.kill(ranks[1].pid, sign)
    text = verdict([ranks[0], ranks[2]])
    assert f"rank 1 ({os.uname().nodename}, pid {ranks[1].pid}) has given no sign of life" in text
    assert "it was in 'third'" in text and "the same command resumes" in text
    assert (tmp_path / "logs/stacks_rank_0.txt").read_text().count("File") and (
        tmp_path / "logs/stacks_rank_2.txt"
    ).is_file()


def test_a_rank_that_hangs_is_named_and_shows_where(ranks: Ranks, tmp_path: Path) -> None:
    """Its thread lives: it learns of the verdict itself, and writes where its main thread is."""
    tell(ranks, "hang")
    text = verdict(ranks)
    assert (
        f"pid {ranks[1].pid}) does not get on: rank 0 has waited for it in 'third'" in text
        and "it was in 'second'" in text
    )
    assert "watch_program.py" in (tmp_path / "logs/stacks_rank_1.txt").read_text()


def test_slow_ranks_and_an_orderly_end_are_no_problem(ranks: Ranks) -> None:
    tell(ranks, "go on")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(ranks[1].pid, signal.SIGCONT)
    time.sleep(2.5)
    tell(ranks[1:2], "leave")  # long before the others: a rank that only generates
    assert ranks[1].wait(timeout=20) == 0
    time.sleep(2.5)
    tell(ranks[::2], "leave")
    assert [(p.wait(timeout=20), p.stderr.read()) for p in ranks] == [(0, "")] * WORLD
