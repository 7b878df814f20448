"""What a checkpoint costs: the quickstart's SFT and PPO without saves, with saves in the background,
and in the foreground, in turns.

    python examples/quickstart/run.py                          # once: its models are where these runs start
    python benchmarks/save.py [--repeats 5] [--stages sft ppo] [--output benchmarks/results/save.md]

Every run has the same steps. `added` is what all steps and saves of a run took more than those of the run without saves
beside it, by the saves; `blocked` is the part in which the run stood still for them (time/save_s). Then one save alone:
a state of `--mib`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
WHERE = ROOT / "runs/benchmark_save"
STAGES: dict[str, tuple[int, int, int, str]] = {
    "sft": (1, 62, 15, "time/step_s"),
    "ppo": (2, 12, 2, "timing_s/step"),
}  # ranks, steps, interval, time
ARMS: dict[str, dict[str, object]] = {
    "none": {"checkpoint.save_interval": 0},
    "background": {"checkpoint.async_save": "true"},
    "foreground": {},
}


def run(stage: str, arm: str) -> dict[str, float]:
    """Seconds of all steps and of all saves but the last, which every run waits for; and the bytes of a checkpoint."""
    ranks, steps, interval, step_time = STAGES[stage]
    out = WHERE / f"{stage}_{arm}"
    shutil.rmtree(out, ignore_errors=True)
    options = {
        "train.output_dir": out,
        "train.max_steps": steps,
        "checkpoint.save_interval": interval,
        "checkpoint.save_optimizer": "true",
        "logging.tensorboard": "false",
        **ARMS[arm],
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "mrlhf", stage, "--config", f"examples/quickstart/{stage}.yaml",
               *(str(part) for key, value in options.items() for part in (f"--{key}", value))]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed: {done.stderr[-3000:]}")
    rows = [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if step_time in r][
        2:
    ]  # the first steps are slower
    newest = max((out / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    return {
        "steps": len(rows),
        "step": median(r[step_time] for r in rows),
        "all": sum(r[step_time] for r in rows),
        "blocked": sum(r.get("time/save_s", 0.0) for r in rows),
        "bytes": sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()),
    }


def costs(stage: str, repeats: int) -> list[str]:
    interval, found = STAGES[stage][2], []
    for i in range(repeats):
        found.append({arm: run(stage, arm) for arm in ARMS})
        print(f"{stage}: {i + 1} of {repeats}", flush=True)
    lines = []
    for arm in ("background", "foreground"):
        saves = found[0][arm]["steps"] // interval
        added = [(one[arm]["all"] + one[arm]["blocked"] - one["none"]["all"]) / saves for one in found]
        step = median(one["none"]["step"] for one in found)
        blocked = median(one[arm]["blocked"] / saves for one in found)
        spread = f"{1000 * median(added):.0f} ({1000 * min(added):.0f} to {1000 * max(added):.0f})"
        lines.append(
            f"| {stage} | {interval} steps | {arm} | {found[0][arm]['bytes'] / 1e6:.1f} | {1000 * step:.0f} | "
            f"{1000 * blocked:.0f} | {spread} "
            f"| {median(added) / step:.2f} | {median(added) / step / interval:.1%} |"
        )
    return lines


def one_save(mib: int, repeats: int) -> list[str]:
    """Wall and CPU seconds of a save's writing thread, for tensors of together `mib`."""
    import torch
    import torch.distributed as dist

    from mrlhf.checkpoint.save import _WritePlan, _Writer

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29777", rank=0, world_size=1)
    items = [(i, torch.full(((mib << 20) // 16 // 4,), float(i))) for i in range(16)]
    walls, cpus = [], []
    for _ in range(repeats):
        writer = _Writer(WHERE / "one", [_WritePlan("dist", items, b"", None)], {})
        wall, cpu = time.perf_counter(), time.process_time()
        writer.run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        assert writer.error is None, writer.error
        shutil.rmtree(WHERE / "one")
    dist.destroy_process_group()
    return [
        (
            f"One save of {mib} MiB on one rank, written, hashed and on the disk: {median(walls):.2f} s, "
            f"{median(cpus):.2f} s of CPU (medians of {repeats})."
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/save.md")
    args = parser.parse_args()
    if args.stages and not (ROOT / "runs/quickstart/rm/metrics.jsonl").is_file():
        sys.exit("the quickstart's models are missing: python examples/quickstart/run.py")
    WHERE.mkdir(parents=True, exist_ok=True)
    lines = [line for stage in args.stages for line in costs(stage, args.repeats)]
    text = "\n".join(
        [
            "# What a checkpoint costs",
            "",
            (
                f"`python benchmarks/save.py --repeats {args.repeats}` on {os.cpu_count()} cores "
                f"({platform.machine()}), fp32; SFT on one rank, PPO with its"
            ),
            "critic on two; weights and optimizer state. Medians, in turns; in brackets smallest and largest.",
            "",
            (
                "| stage | saved every | how | MB | ms a step | ms blocked a save | ms added a save | of a step | "
                "of the run |"
            ),
            "|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            *one_save(args.mib, args.repeats),
            "",
        ]
    )
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
