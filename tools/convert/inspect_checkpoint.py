"""Lists a mrlhf checkpoint, a run's latest checkpoint or a HF directory: names, shapes, dtypes, sizes, metadata.

    python tools/convert/inspect_checkpoint.py DIR [--no-tensors]

Reads headers only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mrlhf.commands.tool import run_tool  # noqa: E402


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    made.add_argument("directory", help="checkpoint, run or HF directory")
    made.add_argument("--no-tensors", action="store_true", help="only the totals and the metadata")
    return made


def show(args: argparse.Namespace) -> int:
    from mrlhf.convert.inspect import list_contents

    for line in list_contents(args.directory, tensors=not args.no_tensors):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(parser(), show))
