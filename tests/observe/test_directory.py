"""Whether a directory can be written, and the lock that gives it to one process at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrlhf.errors import ConfigError, DataError
from mrlhf.observe import directory
from mrlhf.observe.directory import DirectoryLock, directory_problem, file_problems, is_held


def hold(folder: Path, **more: Any) -> DirectoryLock:
    return DirectoryLock(folder / "lock", key="train.output_dir", fix="another directory", **more)


def test_what_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    wrong = {"file": "not a directory", "file/a/b": "not a directory", "gone": "not a directory"}
    wrong["a/" + "x" * 300] = "255 bytes"
    for name, text in wrong.items():
        problem = directory_problem(tmp_path / name, key="train.output_dir")
        assert problem is not None and text in problem.what and "train.output_dir = " in (problem.where or ""), name
    for good in ("new", "new/and/newer", ".", "new/../other"):
        assert directory_problem(tmp_path / good, key="k") is None
    assert directory_problem(Path("as_it_is/run"), key="k") is None and not (tmp_path / "new").exists()
    assert (
        len(file_problems(str(tmp_path), key="output")) == len(file_problems(f"{tmp_path}/file/x", key="output")) == 1
    )


@pytest.mark.parametrize(
    "disk",
    [
        {"f_blocks": 9, "f_bfree": 0, "f_files": 9, "f_ffree": 9},
        {"f_blocks": 9, "f_bfree": 9, "f_files": 9, "f_ffree": 0},
    ],
)
def test_a_full_disk_is_seen_without_writing(
    disk: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory.os, "statvfs", lambda _: SimpleNamespace(**disk))
    problem = directory_problem(tmp_path / "run", key="k")
    assert problem is not None and "full" in problem.what


def test_a_disk_without_permission_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.os, "access", lambda *_: False)
    problem = directory_problem(tmp_path / "run", key="k")
    assert problem is not None and "permission" in problem.what


def test_the_second_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as lock:
        sign = json.loads(lock.file.read_text())
        for kind in (ConfigError, DataError):
            with pytest.raises(kind, match=rf"host {sign['host']}, pid {os.getpid()}, since .*, last sign 0 s ago"):
                hold(tmp_path / "run", kind=kind)
        assert is_held(lock.file) and json.loads(lock.file.read_text()) == sign
    assert lock.file.read_text() == "" and not is_held(lock.file) and not is_held(tmp_path / "none")
    hold(tmp_path / "run").release()


def test_patience_for_a_holder_that_is_about_to_end(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    threading.Timer(0.2, lock.release).start()
    hold(tmp_path, patience_s=20.0).release()


def test_a_killed_holder_leaves_it_though_its_forks_live(tmp_path: Path) -> None:
    """flock belongs to an open file, which a fork shares."""
    reader, writer = os.pipe()
    if (holder := os.fork()) == 0:
        hold(tmp_path)
        if (fork := os.fork()) == 0:
            time.sleep(60)
        os.write(writer, f"{fork:9}".encode())
        time.sleep(60)
        os._exit(0)
    fork = int(os.read(reader, 9))
    try:
        assert is_held(tmp_path / "lock")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(fork, 0)  # it lives
        hold(tmp_path).release()
    finally:
        os.kill(fork, signal.SIGKILL)


@pytest.mark.parametrize(
    "text",
    ["[1]", "5", '{"a": 1}', '{"host": "x", "machine": "y", "pid": 1, "started": "z", "beat": "soon"}', "[" * 9999],
)
def test_a_lock_file_with_something_else_in_it_holds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text)
    with hold(tmp_path) as lock:
        assert json.loads(lock.file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("/dev/full")])
def test_what_is_no_lock_file_is_named(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "lock")
    with pytest.raises(ConfigError, match="cannot be written"):
        hold(tmp_path)


def foreign(file: Path, *, age: float) -> dict[str, Any]:
    sign = {"host": "other", "machine": "other", "pid": 7, "started": "then", "beat": time.time() - age}
    file.write_text(json.dumps(sign))
    return sign


@pytest.fixture(params=["flock", "none"])
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock does not reach the holder on the other machine; with `none` the file system has no flock at all."""
    monkeypatch.setattr(directory, "BEAT_S", 0.05)
    monkeypatch.setattr(directory, "STALE_S", 0.6)
    if request.param == "none":

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(directory.fcntl, "flock", refuse)


@pytest.mark.parametrize("age", [0.0, 100.0, -100.0])  # a clock that runs ahead must not count for ever
def test_a_silent_holder_on_another_machine_is_replaced(
    age: float, quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mrlhf"), "propagate", True)
    foreign(tmp_path / "lock", age=age)
    with hold(tmp_path) as lock:
        assert json.loads(lock.file.read_text())["pid"] == os.getpid()
    assert "host other, pid 7, held it and has given no sign" in caplog.text


@pytest.mark.parametrize("age", [0.0, 100.0])  # a clock that is late must not look like silence
def test_a_living_holder_on_another_machine_is_not(age: float, quick: None, tmp_path: Path) -> None:
    sign, ended = foreign(tmp_path / "lock", age=age), threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            sign["beat"] += 0.02
            (tmp_path / "new").write_text(json.dumps(sign))
            (tmp_path / "new").rename(tmp_path / "lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="host other, pid 7"):
            hold(tmp_path)
    finally:
        ended.set()
        thread.join()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == 7


def test_the_holder_gives_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "BEAT_S", 0.01)
    with hold(tmp_path) as lock:
        first, end = json.loads(lock.file.read_text())["beat"], time.monotonic() + 20
        while json.loads(lock.file.read_text())["beat"] == first:
            assert time.monotonic() < end


def test_a_disk_that_refuses_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory.os, "pwrite", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        hold(tmp_path)
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        hold(tmp_path / "file")
    hold(tmp_path).release()
