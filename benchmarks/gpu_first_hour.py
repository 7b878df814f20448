"""The first hour on a GPU, in the order of worth, in parts that each take less than nine minutes.

    python benchmarks/gpu_first_hour.py [--list] [--only PART ...] [--rehearse] [--wheels DIR] [--output DIR]

Each part is a process of its own. After every line of its result it writes PART.json and PART.md, checks first, under
benchmarks/results/gpu_first_hour: an hour that is cut off loses nothing. Needs no network. --rehearse runs the parts
on fake CUDA tensors on a machine without a GPU, two layers of each model, and says what of them it cannot. --wheels
installs DIR/*.whl, without their requirements, into a temporary folder that only these processes see: for a machine
that has torch for its GPU, and not the rest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 530
SEE = """
import sys
from mrlhf.errors import MrlhfError
try:
    from mrlhf.parallel import device
    device.take_gpu()
except MrlhfError as error:
    sys.exit(error.what)
"""
PARTS = {  # name: (module of first_hour, function, what)
    "machine": ("machine", "machine", "Machine, ceilings and NCCL"),
    "tests": ("machine", "gpu_tests", "The GPU tests"),
    "families": ("training", "families", "Families against transformers in bf16"),
    "sft": ("training", "sft", "SFT steps, 1.5B to 8B"),
    "long": ("training", "long_context", "Long context, 32k to 128k tokens"),
    "experts": ("training", "experts", "Experts"),
    "vllm": ("engines", "vllm", "vLLM beside the trainer"),
    "grpo": ("engines", "grpo", "GRPO, end to end"),
    "trl": ("engines", "trl", "TRL on the same card"),
}


def execute(name: str, folder: Path, rehearsal: bool) -> int:
    """One part, in this process."""
    from first_hour.report import Report

    module, function, title = PARTS[name]
    report = Report(name, title, folder, rehearsal)
    report.write()
    try:
        getattr(importlib.import_module(f"first_hour.{module}"), function)(report)
    except Exception as error:  # the next part may still pass
        report.say("```\n" + traceback.format_exc()[-3000:] + "\n```")
        report.check(
            "the part ends", False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    report.end()
    print(f"{report.status}  {name}, {time.time() - report.started:.0f} s", flush=True)
    return 1 if report.status == "FAIL" else 0


def environment(rehearsal: bool, wheels: Path | None) -> dict[str, str]:
    """Of every part; with the wheels installed."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    if wheels is not None:
        site = tempfile.mkdtemp(prefix="mrlhf-wheels-")
        files = sorted(str(f) for f in wheels.glob("*.whl"))
        if not files:
            sys.exit(f"gpu_first_hour: no wheel in {wheels}")
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)
        paths.append(site)
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    device = {"MRLHF_DEVICE": "rehearsal" if rehearsal else "cuda", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    more = {"TORCH_COMPILE_DISABLE": "1"} if rehearsal else {}
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {**os.environ, **quiet, **device, **more, "PYTHONPATH": os.pathsep.join(paths + inherited)}


def start(names: list[str], folder: Path, rehearsal: bool, env: dict[str, str]) -> None:
    """These parts in one process, ended after its limit with all that it started."""
    flags = ["--in-process", "--output", str(folder), "--only", *names, *(["--rehearse"] if rehearsal else [])]
    process = subprocess.Popen([sys.executable, __file__, *flags], env=env, cwd=ROOT, start_new_session=True)
    try:
        process.wait(timeout=LIMIT_S * len(names))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"CUT   {', '.join(names)}: not done in {LIMIT_S} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the parts, and run none")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="on fake CUDA tensors, without a GPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name, (_, _, title) in PARTS.items():
            print(f"{name:<10} {title}")
        return 0
    folder = args.output or ROOT / "benchmarks/results" / ("gpu_first_hour" + ("_rehearsal" if args.rehearse else ""))
    if args.in_process:
        return max(execute(name, folder, args.rehearse) for name in args.only)
    env = environment(args.rehearse, args.wheels)
    if not args.rehearse:
        done = subprocess.run([sys.executable, "-c", SEE], env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"gpu_first_hour: no GPU to use. {done.stderr.strip().splitlines()[-1]}")
    for name in args.only:
        (folder / f"{name}.json").unlink(missing_ok=True)
    # a rehearsal needs no process for each part: nothing of a device stays behind
    for names in [args.only] if args.rehearse else [[name] for name in args.only]:
        start(names, folder, args.rehearse, env)
    files = {name: folder / f"{name}.json" for name in args.only}
    states = {name: json.loads(file.read_text())["status"] if file.exists() else "CUT" for name, file in files.items()}
    print("\n" + "\n".join(f"{state:<5} {name}" for name, state in states.items()) + f"\n{folder}")
    return 0 if set(states.values()) <= {"PASS", "SKIP"} else 1


if __name__ == "__main__":
    sys.exit(main())
