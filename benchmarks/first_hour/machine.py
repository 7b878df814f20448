"""The parts before any model: what the machine is, what it reaches at most, and the GPU tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from first_hour.report import Report, versions

ROOT = Path(__file__).resolve().parents[2]


def command(report: Report, what: str, *arguments: str, limit_s: float) -> str:
    """Runs a command from the repository's root, checks its status, and returns its output."""
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, timeout=limit_s, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as late:
        report.check(what, False, f"not done in {limit_s:.0f} s")
        return str(late.stdout or "")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    report.check(what, done.returncode == 0, last[-300:].replace("|", "/"))
    if done.returncode:
        report.say("```\n" + done.stdout[-3000:] + "\n```")
    return done.stdout


def seconds_of(call: Callable[[], object], repeats: int = 20) -> float:
    """Of one call, between two events of the device after a warm-up."""
    import torch

    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def machine(report: Report) -> None:
    """`mrlhf doctor`; measured ceilings; an all-reduce on every GPU."""
    report.say(", ".join(f"{name} {version}" for name, version in versions().items()))
    if report.rehearsal:
        rehearse_all_reduce(report)
        return
    text = command(report, "mrlhf doctor finds nothing wrong", sys.executable, "-m", "mrlhf", "doctor", limit_s=120)
    report.say("```\n" + text.strip() + "\n```")
    import torch

    from mrlhf.parallel.peak_rates import gpu_name, peak_tflops

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12
    source, target = (torch.empty(2 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copied = 2 * source.numel() / seconds_of(lambda: target.copy_(source)) / 1e12
    known = peak_tflops("bfloat16")
    report.figure(
        GPU=gpu_name(), **{"bf16 product, TFLOP/s": rate, "data sheet": known or "not known", "copy, TB/s": copied}
    )
    report.check("a bf16 product reaches half of the data sheet's rate", known is None or rate > known / 2)
    torch.cuda.empty_cache()
    gpus = torch.cuda.device_count()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    program = str(Path(__file__).with_name("all_reduce.py"))
    text = command(report, f"NCCL's all-reduce on {gpus} GPU(s)", sys.executable, *launcher, program, limit_s=180)
    for size, seconds in re.findall(r"^RESULT (\d+) (\S+)$", text, re.MULTILINE):
        moved = 2 * (gpus - 1) / gpus * int(size) / float(seconds) / 1e9
        report.figure(**{"all-reduce, bytes": int(size), "s": float(seconds), "bus GB/s": moved})


def rehearse_all_reduce(report: Report) -> None:
    import torch
    import torch.distributed as dist

    from first_hour.training import world
    from mrlhf.config.options import ParallelConfig

    with world(ParallelConfig(), rehearsal=True) as context, context():
        x = torch.ones(1 << 20, device="cuda")
        dist.all_reduce(x)
        report.check("an all-reduce of a fake tensor", x.is_cuda)


def gpu_tests(report: Report) -> None:
    """`make gpu-test`, file by file, so that one that hangs leaves the others' results."""
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    if report.rehearsal:
        report.say("the functions of these tests run on the CPU in `make test`; here they are collected")
        env = {**os.environ, "MRLHF_DEVICE": "cpu"}
        arguments = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/gpu"]
        done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        report.check("the GPU tests are collected", done.returncode == 0, done.stdout.strip().splitlines()[-1])
        return
    for file in files:
        start = time.time()
        name = str(file.relative_to(ROOT))
        text = command(
            report, name, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "--tb=short", name, limit_s=420
        )
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
        report.figure(
            file=name, seconds=time.time() - start, **{w: counts.get(w, 0) for w in ("passed", "failed", "skipped")}
        )
