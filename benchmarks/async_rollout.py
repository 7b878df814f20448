"""Where vLLM is and how far it may be ahead: a PPO step colocated, on ranks of its own in turns,
and there one rollout ahead.

    python examples/quickstart/run.py                      # once: its SFT and reward models are where every run starts
    python benchmarks/async_rollout.py [--ranks 2] [--generators 1] [--steps 12] [--new-tokens 64] [--repeats 3]
                                       [--output FILE.md]

The same ranks in every arm, the arms in turns; medians over the steps of all repeats but the first two steps of each.
Colocated, every rank trains and generates (data parallel, one vLLM replica a rank); apart, the generators take their
ranks from training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("timing_s/step", "timing_s/gen", "timing_s/generators", "timing_s/reshard", "rollout/staleness")


def arms(generators: int) -> dict[str, dict[str, Any]]:
    separate = {"rollout.placement": "separate", "rollout.num_ranks": generators}
    return {
        "colocated": {},
        "separate, in turns": separate,
        "separate, one ahead": {**separate, "rollout.max_staleness": 1, "rollout.correction": "tis"},
    }


def run(args: argparse.Namespace, options: dict[str, Any], out: Path) -> list[dict[str, float]]:
    """Metrics of every step but the first two."""
    common = {
        "parallel.tensor_model_parallel_size": 1,
        "rollout.tensor_parallel_size": 1,
        "rollout.max_new_tokens": args.new_tokens,
        "ppo.critic_warmup_steps": 0,
        "train.max_steps": args.steps,
        "train.micro_batch_size": 64 // args.ranks,
        "train.output_dir": out,
        "logging.tensorboard": "false",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.ranks,
               "-m", "mrlhf", "ppo", "--config", "examples/quickstart/ppo.yaml",
               *(part for k, v in {**common, **options}.items() for part in (f"--{k}", v))]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--generators", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms(args.generators)}
    with tempfile.TemporaryDirectory() as directory:
        for i in range(args.repeats):
            for name, options in arms(args.generators).items():
                found[name] += run(args, options, Path(directory) / f"{name.replace(', ', '_').replace(' ', '_')}_{i}")
    lines = [f"`{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`: seconds of a step, medians", ""]
    lines += ["| | " + " | ".join(COLUMNS) + " | of colocated |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, steps in found.items():
        values = [median(step.get(column, 0.0) for step in steps) for column in COLUMNS]
        of = values[0] / median(step[COLUMNS[0]] for step in found["colocated"])
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {of:.2f} |")
    text = "\n".join(lines)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
