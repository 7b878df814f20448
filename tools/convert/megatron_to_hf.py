"""A mrlhf checkpoint, or a run's latest -> a HF directory for transformers, vLLM and the hub.

    python tools/convert/megatron_to_hf.py --checkpoint DIR --output DIR [--dtype bfloat16] [--part critic] [--verify]

Exits with 0, with 1 when --verify found a difference, with 2 and the reason when the input does not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mrlhf.tool import run_tool  # noqa: E402


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run's directory: its latest")
    made.add_argument("--output", required=True, type=Path, help="HF directory to write; must not exist")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: the checkpoint's)")
    made.add_argument("--part", choices=("actor", "critic"), default="actor", help="which model of a PPO checkpoint (default: actor)")
    made.add_argument("--verify", action="store_true", help="run both models on random tokens and compare")
    return made


def convert(args: argparse.Namespace) -> int:
    from mrlhf.convert import megatron_to_hf, verify

    made = megatron_to_hf(args.checkpoint, args.output, dtype=args.dtype, part="" if args.part == "actor" else args.part)
    spec = made.source.spec
    print(f"{made.source.path} -> {made.path}: {spec.family}, {spec.num_parameters:,} parameters, head {made.source.head}")
    for note in made.notes:
        print(f"note: {note}")
    if args.verify:
        compared = verify(made.source, str(made.path))
        print(compared.describe())
        return 0 if compared.ok else 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(parser(), convert))
