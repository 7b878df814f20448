"""Room for open files: the limit is raised as far as it goes, and named where that is not enough."""

from __future__ import annotations

import subprocess
import sys

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


def test_a_gpu_that_is_not_used_needs_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.os.path, "exists", lambda _: True)
    monkeypatch.setattr(process.os, "environ", environ := {"MRLHF_DEVICE": "cpu"})
    process.prepare_environment()
    assert environ["TORCH_COMPILE_DISABLE"] == "1" and "CUDA_DEVICE_MAX_CONNECTIONS" not in environ


def test_the_limit_on_open_files_is_raised_and_named() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
