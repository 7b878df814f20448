"""Gold reward before and after PPO, and seconds, of the quickstart over several seeds.

    python benchmarks/quickstart.py [--seeds 1 2 3] [--output benchmarks/results/quickstart.md]

Takes about 8 minutes a seed on 2 cores. Runs go to runs/benchmark/seed_N.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/quickstart.md")
    args = parser.parse_args()
    lines = [
        "| seed | gold before | gold after | gain | answer length after | KL | RM accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains = []
    for seed in args.seeds:
        out = ROOT / f"runs/benchmark/seed_{seed}"
        start = time.monotonic()
        command = [
            sys.executable,
            "examples/quickstart/run.py",
            "--seed",
            str(seed),
            "--output-dir",
            str(out),
            "--fresh",
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = time.monotonic() - start
        before, after = (json.loads((out / f"eval/{name}.json").read_text()) for name in ("sft", "ppo"))
        rollouts = [json.loads(line) for line in (out / "ppo/metrics.jsonl").read_text().splitlines()]
        rm = [json.loads(line) for line in (out / "rm/metrics.jsonl").read_text().splitlines()]
        kl = [row["objective/kl"] for row in rollouts if "objective/kl" in row][-5:]
        gains.append(after["gold_reward"] - before["gold_reward"])
        lines.append(
            f"| {seed} | {before['gold_reward']:.3f} | {after['gold_reward']:.3f} | {gains[-1]:+.3f} | "
            f"{after['response_length']:.2f} "
            f"| {sum(kl) / len(kl):.2f} | {rm[-1]['eval/accuracy']:.3f} | {seconds:.0f} |"
        )
    text = "\n".join(
        [
            "# Quickstart",
            "",
            (
                f"`python benchmarks/quickstart.py --seeds {' '.join(map(str, args.seeds))}` on {os.cpu_count()} "
                f"cores ({platform.machine()}), CPU, fp32."
            ),
            (
                "Gold is the program's check of greedy answers to 300 held-out prompts; KL is nats an answer, "
                "mean of the last 5 rollouts."
            ),
            "",
            *lines,
            "",
            f"Median gain {median(gains):+.3f}, smallest {min(gains):+.3f}.",
            "",
        ]
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
