"""A HF model -> a mrlhf checkpoint that loads under any TP, PP and DP.

    python tools/convert/hf_to_megatron.py --hf DIR_or_hub_id --output DIR [--head value] [--dtype bfloat16]
        [--verify] [--dry-run]
    torchrun --nproc-per-node 4 tools/convert/hf_to_megatron.py ...          four ranks share the layers

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
    made.add_argument("--hf", required=True, help="HF directory or hub id, safetensors")
    made.add_argument("--output", required=True, type=Path, help="checkpoint directory to write; must not exist")
    head = "value: a scalar head, initialised from --seed if the model has none (default: the model's head)"
    made.add_argument("--head", choices=("lm", "value"), help=head)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the stored weights (default: the files')")
    made.add_argument("--seed", type=int, default=1, help="for a new value head (default: 1)")
    made.add_argument("--dry-run", action="store_true", help="check everything and print what would be written")
    made.add_argument("--verify", action="store_true", help="run both models on random tokens and compare")
    return made


def convert(args: argparse.Namespace) -> int:
    from mrlhf.convert.hf import hf_to_megatron, plan_import
    from mrlhf.errors import EnvironmentProblem
    from mrlhf.parallel.state import is_main, world_size

    if args.verify and world_size() > 1:
        command = f"python tools/convert/verify.py --checkpoint {args.output} --hf {args.hf}"
        raise EnvironmentProblem("--verify runs in one process", fix=f"without --verify, then {command}")
    if args.dry_run:
        print("\n".join(plan_import(args.hf, head=args.head, dtype=args.dtype).summary()))
        return 0
    made = hf_to_megatron(args.hf, args.output, head=args.head, dtype=args.dtype, seed=args.seed)
    if is_main():
        size = f"{made.spec.family}, {made.spec.num_parameters:,} parameters"
        print(f"{args.hf} -> {made.path}: {size}, {made.manifest['dtype']}, head {made.head}")
    if args.verify:
        from mrlhf.convert.verify import compare_models

        compared = compare_models(made, args.hf)
        print(compared.summary())
        return 0 if compared.ok else 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(parser(), convert))
