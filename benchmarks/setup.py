"""Seconds and size of a cold `make setup` in a fresh clone, and seconds of the second one.

python benchmarks/setup.py [--output benchmarks/results/setup.md]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(*command: str, cwd: Path) -> float:
    start = time.monotonic()
    subprocess.run(command, cwd=cwd, check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/setup.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "mrlhf"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        cold, again = timed("make", "setup", cwd=clone), timed("make", "setup", cwd=clone)
        size = sum(f.lstat().st_size for f in (clone / ".venv").rglob("*") if f.is_file()) / 1e9
    text = (
        f"# Set-up\n\n`python benchmarks/setup.py` on {os.cpu_count()} cores ({platform.machine()}), "
        "pip's cache as it was.\n\n"
        f"| cold `make setup` | again | `.venv` |\n|---|---|---|\n| {cold:.0f} s | {again:.1f} s | {size:.2f} GB |\n"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
