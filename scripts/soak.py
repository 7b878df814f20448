"""Runs, data, conversions and rewards broken again and again:
every fuzz and fault suite, each bounded in time, and a summary table.

usage: python scripts/soak.py [--only NAME ...]
Status 1 where a suite failed or did not end in time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITES: dict[str, tuple[list[str], int]] = {  # what pytest is given, and the limit in seconds
    "killed runs": (["-m", "soak", "tests/faults"], 3600),  # 10 minutes on a quiet machine
    "stopped and hung runs": (["-m", "not soak", "tests/faults"], 900),
    "checkpoints": (["tests/checkpoint/test_checkpoint.py"], 300),
    "data": (
        [
            "tests/data/prepare/test_interruptions.py",
            "tests/data/test_inspect.py",
            "tests/data/prepare/test_sources.py",
            "tests/data/prepare/test_template_properties.py",
        ],
        900,
    ),
    "conversion": (["tests/convert/test_convert_faults.py"], 600),
    "rewards": (
        [
            "tests/rl/rewards/test_rewards.py",
            *(f"tests/rl/rewards/test_reward_{name}.py" for name in ("http", "process", "server", "runs")),
        ],
        600,
    ),
    "untrusted files": (["tests/checkpoint/test_safe_pickle.py", "tests/test_security.py"], 300),
    "two hosts": (["-m", "soak", "tests/test_two_hosts.py"], 900),
}


def run(name: str) -> tuple[int, int, float, bool]:
    """(tests, failed, seconds, ended in time)."""
    arguments, limit = SUITES[name]
    with tempfile.TemporaryDirectory() as made:
        report, start, ended = Path(made) / "report.xml", time.monotonic(), True
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rP",
            "--timeout",
            str(limit),
            "--junitxml",
            str(report),
            *arguments,
        ]
        try:
            subprocess.run(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=limit + 60, check=False
            )
        except subprocess.TimeoutExpired:
            ended = False
        seconds = time.monotonic() - start
        suites = ET.parse(report).getroot().iter("testsuite") if report.is_file() else []
        counts = [(int(s.get("tests", 0)), int(s.get("failures", 0)) + int(s.get("errors", 0))) for s in suites]
    return sum(n for n, _ in counts), sum(n for _, n in counts), seconds, ended and bool(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="NAME", help=", ".join(SUITES)
    )
    lines, bad = [f"{'suite':<24}{'tests':>6}{'failed':>8}{'seconds':>9}"], False
    for name in parser.parse_args().only:
        tests, failed, seconds, ended = run(name)
        lines.append(f"{name:<24}{tests:>6}{failed:>8}{seconds:>9.0f}{'' if ended else '   did not end'}")
        bad |= not tests or bool(failed) or not ended
        print("\n" + "\n".join(lines), flush=True)  # after each: one that hangs takes nothing from those before it
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
