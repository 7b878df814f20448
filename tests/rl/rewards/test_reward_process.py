"""A reward function's accidents stay in its own process, and end in an error that names it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from mrlhf.errors import ConfigError, RewardError
from mrlhf.rl.rewards.kinds import parse_source
from mrlhf.rl.rewards.process import RewardProcess

CODE = """
import atexit, ctypes, os, select, signal, sys, threading, time, subprocess

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

calls = []
def shifted(how, completions):  # forks in the first call only; each call's score is its number
    calls.append(how)
    if len(calls) == 1:
        how()
    return [float(len(calls))] * len(completions)

def forks():
    os.fork()

def fork_raises():
    if os.fork() == 0: raise ValueError("in the child")

def fork_exits():
    if os.fork() == 0:
        atexit.register(os.write, 1, b"from the child")
        sys.exit(3)

def fork_after_the_call():
    signal.signal(signal.SIGALRM, lambda *_: os.fork())
    signal.setitimer(signal.ITIMER_REAL, 0.05)

def fork_takes_the_next_request():
    if os.fork() == 0:
        for fd in range(3, 64):
            try: select.select([fd], [], [], 1)[0] and os.read(fd, 8)
            except OSError: pass
        os._exit(0)

def fork_in_a_thread():
    thread = threading.Thread(target=forks)
    thread.start()
    thread.join()

def daemonised():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(0.05)

def fork_returned(completions, **columns): return shifted(forks, completions)
def fork_raised(completions, **columns): return shifted(fork_raises, completions)
def fork_left(completions, **columns): return shifted(fork_exits, completions)
def fork_threaded(completions, **columns): return shifted(fork_in_a_thread, completions)
def fork_late(completions, **columns): return shifted(fork_after_the_call, completions)
def fork_thief(completions, **columns): return shifted(fork_takes_the_next_request, completions)
def fork_daemonised(completions, **columns): return shifted(daemonised, completions)
def fork_in_the_answer(completions, **columns):
    class Forks(list):
        def __iter__(self):
            shifted(forks, completions)
            return super().__iter__()
    return Forks([float(len(calls) + 1)] * len(completions))

def sleeps_in_another_session(completions, **columns):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execv("/bin/sleep", ["MARK", "1000"])
        os._exit(0)
    return [1.0] * len(completions)
def and_crashes(completions, **columns):
    sleeps_in_another_session(completions)
    os.abort()

def writes_to_its_pipes(completions, **columns):
    for fd in range(3, 60):
        try: os.write(fd, bytes([255] * 8))
        except OSError: pass
    return [1.0] * len(completions)

class Unreadable(float):
    def __float__(self): raise RuntimeError("boo")
    def __repr__(self): raise RuntimeError("boo")
class Mute(Exception):
    def __str__(self): raise RuntimeError("no text")
def surrogate(prompts, **columns): raise ValueError("a\\ud800b")
def mute(prompts, **columns): raise Mute
def huge_text(prompts, **columns): raise ValueError("z" * 50_000_000)
def in_a_library(prompts, **columns): return [__import__("json").loads("{")]
def huge_score(completions, **columns): return [10 ** 5000] * len(completions)
def unreadable(completions, **columns): return [Unreadable(1)] * len(completions)
def half_a_list(completions, **columns): return type("L", (list,), {"__len__": lambda self: 2})([1.0] * 5)
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
        ("exits", r"raised SystemExit: enough \(.*mine.py:\d+\)"),
        ("crashes", "its process was killed by SIGSEGV"),
        ("raises", r"raised ZeroDivisionError: division by zero \(.*mine.py:21\)"),
        ("too_few", "1 scores for the 2 completions"),
        ("text", "gave str '1' at index 0"),
        ("nan", "gave nan at index 1"),
        ("inf", "gave inf at index 0"),
        ("nothing", "answered with NoneType None"),
        ("fills_the_disk", "raised OSError.*too large|killed by SIGXFSZ"),
        ("writes_to_its_pipes", "it wrote to the pipe of its answers"),
        ("surrogate", r"raised ValueError: a\\ud800b \(.*mine.py:\d+\)"),
        ("mute", r"raised Mute: its text raises RuntimeError \(.*mine.py:\d+\)"),
        ("huge_text", r"raised ValueError: z{1000}\.\.\. \(.*mine.py:\d+\)$"),
        ("in_a_library", r"raised JSONDecodeError: Expecting .* \(.*mine.py:\d+\)"),
        ("huge_score", "gave <int that cannot be shown> at index 0"),
        ("unreadable", r"raised RuntimeError: boo \(.*mine.py:\d+\)"),
        ("half_a_list", "5 scores for the 2 completions"),
    ],
)
def test_accidents_are_errors_that_name_the_function(file: Path, name: str, message: str) -> None:
    with start(file, name, memory_mib=2048) as process:
        with pytest.raises(RewardError, match=message) as caught:
            ask(process)
        assert f"{file}:{name}" in str(caught.value)
        if name == "bomb":
            assert "2048 MiB" in str(caught.value) and "--reward.function_memory_mib" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["returned", "raised", "left", "threaded", "daemonised", "in_the_answer", "late", "thief"]
)
def test_a_fork_that_comes_back_answers_nothing(file: Path, name: str) -> None:
    with start(file, f"fork_{name}") as process:
        for number in range(1, 4):
            assert ask(process) == [float(number)] * 2
            time.sleep(0.1)  # the daemon comes back late


def test_a_fork_at_import_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(
        "import os\nos.fork()\ndef f(completions, **k): return [float(c) for c in completions]"
    )
    with start(tmp_path / "forks.py", "f") as process:
        for number in ("1", "2"):
            arguments = {"labels": [0], "prompt_ids": [[]], "completion_ids": [[]]}
            assert process.score(["p"], [number], **arguments) == [float(number)]


def test_an_answer_to_another_request_is_an_error(file: Path) -> None:
    with start(file, "good") as process:
        ask(process)
        process._number = 3
        columns = {
            "prompts": ["p"], "completions": ["a"], "labels": [1], "prompt_ids": [[]], "completion_ids": [[]]
        }  # fmt: skip
        with pytest.raises(RewardError, match="the answer to request 2 came instead of that to request 3"):
            process._exchange("failed", msgspec.msgpack.encode({"number": 2, "columns": columns}), 2)


@pytest.mark.parametrize("end", ["close", "crash", "kill the trainer"])
def test_no_process_of_the_function_outlives_it(file: Path, tmp_path: Path, end: str) -> None:
    mark = f"mrlhf-{tmp_path.name}-{os.getpid()}"
    own = tmp_path / "mine.py"
    own.write_text(file.read_text().replace("MARK", mark))

    def alive() -> bool:
        lines = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
        return any(line.startswith(mark.encode()) for line in lines)

    def wait_until(wanted: bool) -> bool:
        deadline = time.monotonic() + 20
        while alive() is not wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        return alive() is wanted

    if end == "kill the trainer":
        code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_reward_process import ask, start
ask(start(Path({str(own)!r}), "sleeps_in_another_session"))
print("ready", flush=True)
time.sleep(1000)
"""
        trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n" and wait_until(True)
        trainer.kill()
        trainer.wait()
    elif end == "close":
        with start(own, "sleeps_in_another_session") as process:
            assert ask(process) == [1.0, 1.0] and wait_until(True)
    else:
        with start(own, "and_crashes") as process, pytest.raises(RewardError, match="killed by SIGABRT"):
            ask(process)
    assert wait_until(False)


def test_what_it_prints_is_in_its_log_up_to_a_limit(file: Path, tmp_path: Path) -> None:
    log = tmp_path / "reward.log"
    with start(file, "good", log=log) as process:
        ask(process)
    assert log.read_text() == "printed text does no harm\n"
    with start(file, "raises", log=log) as process, pytest.raises(RewardError):
        ask(process)
    assert 'mine.py", line 21, in raises' in log.read_text()
    (tmp_path / "talks.py").write_text(
        "def f(completions, **k):\n print('x' * (70 << 20))\n return [1.0] * len(completions)"
    )
    with start(tmp_path / "talks.py", "f", log=tmp_path / "long.log") as process:
        assert ask(process) == ask(process) == [1.0, 1.0]
    assert (64 << 20) <= (tmp_path / "long.log").stat().st_size < (65 << 20)
    with start(file, "good", log=tmp_path / "no such directory" / "x.log") as process:
        assert ask(process) == [111.0, 502.0]


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
    with pytest.raises(ConfigError, match="--reward.sources .*mine.py:good"):
        start(file, "goood")
    (tmp_path / "slow.py").write_text(SLOW_START)
    with pytest.raises(ConfigError, match="could not be loaded: it did not answer within 1 s"):
        start(tmp_path / "slow.py", "f", timeout_s=1)
    (tmp_path / "exit.py").write_text(EXIT_AT_START)
    with pytest.raises(ConfigError, match="could not be loaded: its process exited with status 3"):
        start(tmp_path / "exit.py", "f")


def test_nan_stays_nan_on_the_way() -> None:
    """The wire format keeps what JSON would lose."""
    assert math.isnan(msgspec.msgpack.decode(msgspec.msgpack.encode({"scores": [math.nan]}))["scores"][0])
