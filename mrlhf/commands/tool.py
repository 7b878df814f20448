"""How the scripts in tools/convert/ start and end: environment before torch, user errors in one line, exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

from mrlhf.config.process import USER_ERROR, prepare_environment
from mrlhf.errors import MrlhfError, SeveralErrors


def run_tool(parser: argparse.ArgumentParser, call: Callable[[argparse.Namespace], int], argv: list[str] | None = None) -> int:
    """Exit status of `call(arguments)`; an MrlhfError is printed to stderr once and gives 2.

    The CPU is chosen unless MRLHF_DEVICE says otherwise: a conversion is bound by the disk, and a model that
    needs eight GPUs fits into one machine's memory.
    """
    arguments = parser.parse_args(argv)
    prepare_environment()
    os.environ.setdefault("MRLHF_DEVICE", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        return call(arguments)
    except MrlhfError as error:
        print(error if isinstance(error, SeveralErrors) else f"{type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    finally:
        if "mrlhf.parallel.state" in sys.modules:
            sys.modules["mrlhf.parallel.state"].shutdown()
