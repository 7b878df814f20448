"""A checkpoint of mrlhf or Megatron-LM, or a run's latest -> a HF directory for transformers, vLLM and the hub.

    python tools/convert/megatron_to_hf.py --checkpoint DIR --output DIR [--dtype bfloat16] [--part critic]
        [--verify] [--dry-run]
    torchrun --nproc-per-node 4 tools/convert/megatron_to_hf.py ...          four ranks share the layers

Converts one tensor at a time: memory is a few times the largest one. A killed conversion continues where it stopped.

Exits with 0; with 1 if --verify finds a difference; with 2 and the reason if the input does not fit.
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
    made.add_argument("--output", required=True, type=Path, help="HF directory to write; must not exist")
    dtypes, parts = ("float32", "bfloat16", "float16"), ("actor", "critic")
    made.add_argument("--dtype", choices=dtypes, help="of the written weights (default: the checkpoint's)")
    made.add_argument("--part", choices=parts, default="actor", help="the model of a PPO checkpoint (default: actor)")
    made.add_argument("--dry-run", action="store_true", help="check everything and print what would be written")
    made.add_argument("--verify", action="store_true", help="run both models on random tokens and compare")
    return made


def convert(args: argparse.Namespace) -> int:
    from mrlhf.convert.hf import megatron_to_hf, plan_export
    from mrlhf.errors import EnvironmentProblem
    from mrlhf.parallel.state import is_main, world_size

    if args.verify and world_size() > 1:
        command = f"python tools/convert/verify.py --checkpoint {args.checkpoint} --hf {args.output}"
        raise EnvironmentProblem("--verify runs in one process", fix=f"without --verify, then {command}")
    if args.dry_run:
        print("\n".join(plan_export(args.checkpoint, args.output, dtype=args.dtype, part=args.part).summary()))
        return 0
    made = megatron_to_hf(args.checkpoint, args.output, dtype=args.dtype, part=args.part)
    if is_main():
        size = f"{made.source.spec.family}, {made.source.spec.num_parameters:,} parameters"
        print(f"{made.source.path} -> {made.path}: {size}, head {made.source.head}")
        for note in made.notes:
            print(f"note: {note}")
    if args.verify:
        from mrlhf.convert.verify import compare_models

        compared = compare_models(made.source, str(made.path))
        print(compared.summary())
        return 0 if compared.ok else 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(parser(), convert))
