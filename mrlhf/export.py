"""`python -m mrlhf.export CHECKPOINT OUTPUT` writes a checkpoint as a HF directory.

A run starts it for its exports; users have tools/convert/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mrlhf.commands.tool import run_tool


def _export(args: argparse.Namespace) -> int:
    from mrlhf.convert.hf import megatron_to_hf

    megatron_to_hf(str(args.checkpoint), args.output)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    sys.exit(run_tool(parser, _export))
