"""Where log records go: information on stdout as bare lines of rank 0, warnings on stderr.

Modules use `logging.getLogger(__name__)`. Rank 0 alone shows INFO and DEBUG; every rank shows its WARNING and above.
Importing this module sets up nothing: the command line calls `set_up`, and a library user configures the logger
"mrlhf" like any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys


class _Console(logging.Handler):
    """Writes to the current sys.stdout or sys.stderr and flushes, so that SLURM logs keep the order of the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        if not is_warning and int(os.environ.get("RANK", "0")):
            return
        text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        with contextlib.suppress(OSError):  # a terminal that was closed, or a full disk, must not end a run
            print(text, file=sys.stderr if is_warning else sys.stdout, flush=True)


def set_up() -> None:
    """Adds the console handler to the logger "mrlhf". Further calls do nothing."""
    logger = logging.getLogger("mrlhf")
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)
        logger.propagate = False
