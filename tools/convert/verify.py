"""Compares the outputs of a mrlhf checkpoint and a HF directory on random tokens, packed and unpacked, in fp32.

    python tools/convert/verify.py --checkpoint DIR --hf DIR [--part critic]

Exits with 0; with 1 if the largest difference exceeds the tolerance; with 2 and the reason if they cannot be compared.
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
    made.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run's directory: its latest")
    made.add_argument("--hf", required=True, help="HF directory or hub id")
    parts = ("actor", "critic")
    made.add_argument("--part", choices=parts, default="actor", help="the model of a PPO checkpoint (default: actor)")
    made.add_argument("--seed", type=int, default=0, help="for the random tokens (default: 0)")
    return made


def compare(args: argparse.Namespace) -> int:
    from mrlhf.convert.hf import open_part
    from mrlhf.convert.verify import compare_models

    compared = compare_models(open_part(args.checkpoint, args.part), args.hf, seed=args.seed)
    print(compared.summary())
    return 0 if compared.ok else 1


if __name__ == "__main__":
    sys.exit(run_tool(parser(), compare))
