"""Room for open files: the limit is raised as far as it goes, and named where that is not enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mrlhf.config import process

PROGRAM = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 60))
from mrlhf.config.process import naming_file_limit, raise_file_limit
from mrlhf.errors import EnvironmentProblem

files = []
def open_files(n):
    with naming_file_limit():
        files.extend(open("/dev/null") for _ in range(n))
raise_file_limit()
open_files(45)
try:
    open_files(45)
except EnvironmentProblem as error:
    files.clear()
    assert error.where == "/dev/null" and "is 60" in error.what and "ulimit" in error.fix, error
else:
    raise SystemExit("no error")
try:
    with naming_file_limit():
        open("/no/such/file")
except FileNotFoundError:
    print("done")
"""


def test_a_gpu_that_is_not_used_needs_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process.gpu_files, "__defaults__", (tmp_path, tmp_path))
    for files in (("nvidia0",), ("nvidia3",), ("dxg", "libcuda.so.1")):  # a container's third GPU; a GPU under WSL
        for name in files:
            (tmp_path / name).touch()
        for values, used in (({}, True), ({"MRLHF_DEVICE": "cpu"}, False), ({"CUDA_VISIBLE_DEVICES": ""}, False)):
            monkeypatch.setattr(process.os, "environ", environ := dict(values))
            process.prepare_environment()
            assert ("TORCH_COMPILE_DISABLE" in environ, "CUDA_DEVICE_MAX_CONNECTIONS" in environ) == (not used, used)
        for name in files:
            (tmp_path / name).unlink()


def test_the_limit_on_open_files_is_raised_and_named() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
