"""A reward function's accidents stay in its own process, and end in an error that names it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from mrlhf.errors import ConfigError, RewardError
from mrlhf.rl.rewards.kinds import parse_source
from mrlhf.rl.rewards.process import RewardProcess

CODE = """
import ctypes, os, sys, time, subprocess

def good(prompts, completions, label, **columns):
    print("printed text does no harm")
    return [len(c) + (l or 0) + sum(ids) for c, l, ids in zip(completions, label, columns["completion_ids"])]

def loop(prompts, **columns):
    while True: pass

def sleeps_with_children(prompts, **columns):
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)

def bomb(prompts, **columns):
    return [bytearray(1 << 30) for _ in range(100)]

def leaves(prompts, **columns): os._exit(0)
def exits(prompts, **columns): sys.exit("enough")
def crashes(prompts, **columns): ctypes.string_at(0)
def raises(prompts, **columns): return 1 / 0
def too_few(prompts, **columns): return [1.0]
def text(prompts, **columns): return ["1", 2]
def nan(prompts, **columns): return [1.0, float("nan")]
def inf(prompts, **columns): return [float("inf"), 1.0]
def nothing(prompts, **columns): pass
def environment(prompts, **columns): return [len(os.environ.get(n, "")) for n in ("HF_TOKEN", "GIVEN")]
def fills_the_disk(prompts, **columns):
    with open("/dev/shm/mrlhf-test-%d" % os.getpid(), "wb") as f:
        os.unlink(f.name)
        while True: f.write(bytes(1 << 20))
"""
SLOW_START = "import time\ntime.sleep(1000)\ndef f(prompts, **columns): ...\n"
EXIT_AT_START = "import os\nos._exit(3)\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(CODE)
    return path


def start(file: Path, name: str, **options) -> RewardProcess:
    return RewardProcess(parse_source(f"{file}:{name}"), **{"timeout_s": 20.0, **options})


def alive_in_group(group: int) -> list[str]:
    """Processes that still run; what is dead but not yet collected by init does not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(pgrp) == group and state not in "ZX":
            found.append(path.parent.name)
    return found


def ask(process: RewardProcess, labels=(10, None)) -> list[float]:
    return process.score(
        ["p", "q"], ["a", "bb"], labels=list(labels), prompt_ids=[[1], [2]], completion_ids=[[100], [200, 300]]
    )


def test_scores_and_columns_cross_and_one_process_serves_all_calls(file: Path) -> None:
    with start(file, "good") as process:
        pid = process._process.pid
        assert ask(process) == [111.0, 502.0] and ask(process, (None, None)) == [101.0, 502.0]
        assert process.score([], [], labels=[], prompt_ids=[], completion_ids=[]) == []
        many = 3000
        assert (
            process.score(
                [" " * 4000] * many,
                ["x"] * many,
                labels=[0] * many,
                prompt_ids=[[]] * many,
                completion_ids=[[1]] * many,
            )
            == [2.0] * many
        )
        with pytest.raises(RewardError, match=r"mine.py:good' cannot be sent"):
            ask(process, (object(), None))
    assert process._process.returncode is not None
    assert not alive_in_group(pid)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bomb", "raised MemoryError"),
        ("leaves", "its process exited with status 0"),
        ("exits", "its process exited with status 1"),
        ("crashes", "its process was killed by SIGSEGV"),
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("too_few", "1 scores for the 2 completions"),
        ("text", "gave str '1' at index 0"),
        ("nan", "gave nan at index 1"),
        ("inf", "gave inf at index 0"),
        ("nothing", "answered with NoneType None"),
        ("fills_the_disk", "raised OSError.*too large|killed by SIGXFSZ"),
    ],
)
def test_accidents_are_errors_that_name_the_function(file: Path, name: str, message: str) -> None:
    with start(file, name, memory_mib=2048) as process:
        with pytest.raises(RewardError, match=message) as caught:
            ask(process)
        assert f"{file}:{name}" in str(caught.value)
        if name == "bomb":
            assert "2048 MiB" in str(caught.value) and "--reward.function_memory_mib" in str(caught.value)


@pytest.mark.parametrize("name", ["loop", "sleeps_with_children"])
def test_what_does_not_end_is_killed_with_its_children(
    file: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with start(file, name) as process:
        process.timeout_s = 0.5
        began = time.monotonic()
        with pytest.raises(RewardError, match=f"{name}' failed: it did not answer within 0.5 s"):
            ask(process)
        assert time.monotonic() - began < 20
        assert not alive_in_group(process._process.pid)
    assert f"in {name}" in capfd.readouterr().err, "where it was"


def test_it_sees_no_secret_but_what_it_was_given(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("GIVEN", "xyz")
    with start(file, "environment", env=["GIVEN"]) as process:
        assert ask(process) == [0.0, 3.0]
    with start(file, "environment") as process:
        assert ask(process) == [0.0, 0.0]
    with pytest.raises(ConfigError, match="ABSENT"):
        start(file, "environment", env=["ABSENT"])


def test_what_cannot_be_loaded_is_a_config_error(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean .*mine.py:good"):
        start(file, "goood")
    (tmp_path / "slow.py").write_text(SLOW_START)
    with pytest.raises(ConfigError, match="could not be loaded: it did not answer within 1 s"):
        start(tmp_path / "slow.py", "f", timeout_s=1)
    (tmp_path / "exit.py").write_text(EXIT_AT_START)
    with pytest.raises(ConfigError, match="could not be loaded: its process exited with status 3"):
        start(tmp_path / "exit.py", "f")


def test_nan_stays_nan_on_the_way() -> None:
    """The wire format keeps what JSON would lose."""
    import msgspec

    assert math.isnan(msgspec.msgpack.decode(msgspec.msgpack.encode({"scores": [math.nan]}))["scores"][0])
