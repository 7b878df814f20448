"""Whether `pip install 'mrlhf[gpu]'` and `DEVICE=gpu make setup` find a wheel of everything: nothing is compiled.

Asks the package index by uv, which is not among the requirements: it is fetched into build/uv on the first use. Says so
and ends well where no index answers. Prints the versions that go together.
usage: python scripts/resolve_gpu.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "build" / "uv"
PYTHONS = ("3.11", "3.12", "3.13")  # under 3.14 pip compiles megatron-core 0.16.1's index helper, a C++ file
PLATFORM = "x86_64-manylinux_2_31"  # the oldest glibc that every wheel has, of llguidance, which vLLM needs
SHOWN = ("torch", "vllm", "triton", "megatron-core", "transformers", "nvidia-nccl-cu13", "nvidia-cublas")


def skip(why: str) -> int:
    print(f"resolve_gpu: skipped, {why}")
    return 0


def command(python: str) -> list[str]:
    files = [f"requirements/{name}.txt" for name in ("base", "gpu")]
    options = ["--python-version", python, "--python-platform", PLATFORM, "--only-binary", ":all:", "--no-header"]
    return [str(TOOL / "bin" / "uv"), "pip", "compile", "--quiet", "--no-annotate", *options, *files]


def versions(text: str) -> dict[str, str]:
    """Package -> version of uv's answer, one `name==version` a line."""
    return dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", text, re.MULTILINE))


def problem(found: dict[str, str]) -> str | None:
    """What is wrong with a set of packages that fit each other."""
    missing = [name for name in ("torch", "vllm", "megatron-core") if name not in found]
    if missing:
        return f"no {', '.join(missing)} among the packages"
    if not any(name.startswith("nvidia-cublas") or name == "cuda-toolkit" for name in found):
        return f"torch {found['torch']} is a build without CUDA"
    return None


def main() -> int:
    if not TOOL.is_dir():
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        fetch += ["--target", str(TOOL), "uv"]
        done = subprocess.run(fetch, check=False, timeout=300, capture_output=True, text=True)
        if done.returncode:
            return skip(f"uv could not be installed ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})")
    status = 0
    for python in PYTHONS:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command(python), cwd=ROOT, env=env, check=False, timeout=300, capture_output=True, text=True
        )
        if done.returncode and re.search(r"failed to (fetch|connect)|error sending request|dns", done.stderr.lower()):
            return skip("the index does not answer")
        found = versions(done.stdout)
        wrong = done.stderr.strip() if done.returncode else problem(found)
        told = f"no: {wrong}" if wrong else ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
        print(f"resolve_gpu: Python {python}: {told}")
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
