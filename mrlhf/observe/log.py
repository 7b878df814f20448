"""Where log records go: what a run says on stdout as bare lines of rank 0, warnings on stderr.

Modules use `logging.getLogger(__name__)`. INFO and DEBUG are shown by rank 0 alone, WARNING and above by whichever rank
logs them. Nothing is set up on import: the command line calls `set_up`, and a library user may configure the logger
"mrlhf" as any other.
"""

from __future__ import annotations

import logging
import os
import sys


class _Console(logging.Handler):
    """Writes to what sys.stdout and sys.stderr are at that moment, flushed: the lines land in SLURM logs in their
    order.
    """

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        if not is_warning and int(os.environ.get("RANK", "0")):
            return
        text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        print(text, file=sys.stderr if is_warning else sys.stdout, flush=True)


def set_up() -> None:
    """Once a process, however often it is called."""
    logger = logging.getLogger("mrlhf")
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())
        logger.setLevel(logging.INFO)
        logger.propagate = False
