"""How the command line and the scripts in tools/ start and end: environment, user errors as text, exit status."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mrlhf.checkpoint.manifest import newest_whole, steps_in
from mrlhf.config.process import USER_ERROR, naming_file_limit, prepare_environment, torchrun_rank
from mrlhf.errors import MrlhfError, SeveralErrors, disk_problem, error_text

PATIENCE_S = 15.0  # rank 0 shows its error first; another rank shows its own only if the job still runs after this time


def run_tool(
    parser: argparse.ArgumentParser, call: Callable[[argparse.Namespace], int], argv: list[str] | None = None
) -> int:
    """Returns the exit status of `call(arguments)`; an MrlhfError is printed to stderr once and gives 2.

    Runs on the CPU unless MRLHF_DEVICE is set: the disk limits a conversion, and a model that needs eight GPUs fits
    into one machine's memory.
    """
    leave_at_interrupt()
    prepare_environment()
    os.environ.setdefault("MRLHF_DEVICE", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        with naming_system_errors():
            return until_closed(lambda: call(parser.parse_args(argv)))
    except MrlhfError as error:
        print(error_text(error), file=sys.stderr)
        return USER_ERROR
    finally:
        if "mrlhf.parallel.state" in sys.modules:
            sys.modules["mrlhf.parallel.state"].shutdown()


@contextmanager
def naming_system_errors() -> Iterator[None]:
    """Raises EnvironmentProblem for what the disk or the limit on open files refuses to its block."""
    try:
        with naming_file_limit():
            yield
    except OSError as error:
        if (problem := disk_problem(error)) is None:
            raise
        raise problem from error


def until_closed(call: Callable[[], int]) -> int:
    """Returns `call()`; 0 where the reader of its output (`| head`) closes the pipe before the end."""
    try:
        try:
            return call()
        finally:  # also before the exit of --help
            sys.stdout.flush()
    except BrokenPipeError:  # send what is still buffered nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def leave_at_interrupt() -> None:
    """Ctrl-C ends the process at once and without a traceback, also inside C code; training stages take it later
    (training/stopping.py). What a command has not finished has a temporary name.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def show_user_errors(call: Callable[[], int], *, run_dir: Path | None = None) -> int:
    """Returns the exit status of `call()`; an MrlhfError or an error of the disk is printed framed and gives 2.

    run_dir: the run's directory, if `call` is a training stage.
    """
    try:
        with naming_system_errors():
            return call()
    except MrlhfError as error:
        _show_error(error, run_dir if error.ends_a_run else None)
    if _is_distributed():
        # A normal exit runs destructors, which wait for ranks that are still inside a collective.
        sys.stdout.flush()
        os._exit(USER_ERROR)
    return USER_ERROR


def _kept(run_dir: Path) -> str:
    newest, _ = newest_whole(steps_in(run_dir / "checkpoints"), verify="size")
    if newest is None:
        return "  kept:     nothing: this run has no checkpoint yet"
    changes = "changes of its numbers need --train.allow_changes '[KEY]'"
    return f"  kept:     {newest}: the same command continues from there; {changes}"


def _show_error(error: MrlhfError, run_dir: Path | None) -> None:
    """On rank 0 at once. On another rank only if the job outlives PATIENCE_S: then rank 0 did not see the problem.

    run_dir: of a run that the error ends; its newest checkpoint is named.
    """
    count = f"{len(error.errors)} problems:\n" if isinstance(error, SeveralErrors) else ""
    text, rank = count + error_text(error), torchrun_rank()
    if run_dir is not None:
        text += f"\n{_kept(run_dir)}"
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the stage's own handler would let the sleep continue
        time.sleep(PATIENCE_S)
        text = "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())
    bar = "=" * 100
    sys.stdout.flush()
    sys.stderr.write(f"{bar}\n{text}\n{bar}\n")
    sys.stderr.flush()


def _is_distributed() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
