"""Fixes of the machine (open files, disks, two commands at once), and of files that a run wrote."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
from pathlib import Path
from types import SimpleNamespace

from mrlhf.config.process import naming_file_limit
from mrlhf.convert import hf
from mrlhf.errors import disk_problem
from mrlhf.observe.report import build_report

from .harness import By, Command, Scenario, call, state


def _open_files(limit: int) -> None:
    """300 files, under this limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with contextlib.ExitStack() as files, naming_file_limit():
            for _ in range(300):
                files.enter_context(open(os.devnull))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _written(path: str) -> None:
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        if (problem := disk_problem(error)) is not None:
            problem.where = path
            raise problem from error
        raise


def _run_directory(bench: SimpleNamespace) -> Path:
    (bench.tmp / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    (bench.tmp / "env.json").write_text("half of an ob")
    return bench.tmp


def report(name: str, by: By) -> Scenario:
    make = call(lambda bench: build_report({"a": bench.tmp}, bench.tmp / "r.html").read_text(), _run_directory)
    right = lambda bench, page: "train/loss" in page or 1 / 0  # noqa: E731
    return Scenario(name, make, "remove it, or copy it again", by=by, right=right)


def _locked(bench: SimpleNamespace) -> Command:
    """A conversion into a directory that another process writes into."""
    folder = bench.tmp / "out.tmp"
    folder.mkdir()
    bench.lock = open(folder / "lock", "ab")  # noqa: SIM115  held until the end of the scenario
    fcntl.flock(bench.lock, fcntl.LOCK_EX)

    def run(command: Command) -> None:
        hf._lock(Path(f"{command.flags[1]}.tmp"), Path(command.flags[1])).release()

    return Command(run, ["--output", str(bench.tmp / "out")])


WAIT = "wait until it ends, or another --output"
SCENARIOS = [
    state(
        _open_files,
        100,
        "raise it in limits.conf, LimitNOFILE= or --ulimit nofile=65536",
        min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "limit on open files",
    ),
    state(_written, "/dev/full", "make room, then the same command again", os.devnull, "disk that is full"),
    state(_written, "/proc", "another path, or mend this one", os.devnull, "path of another kind"),
    report("environment that is damaged", lambda bench, command, fix: (bench.tmp / "env.json").unlink()),
    report("environment that is copied", lambda bench, command, fix: (bench.tmp / "env.json").write_text("{}")),
    Scenario("two conversions", _locked, WAIT, by=lambda bench, command, fix: bench.lock.close()),
    Scenario(
        "two conversions, another",
        _locked,
        WAIT,
        by=lambda bench, command, fix: (bench.tmp / "b.tmp").mkdir() or command.set("--output", f"{bench.tmp}/b"),
    ),
]
