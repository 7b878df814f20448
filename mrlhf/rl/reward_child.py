"""The processes of a Python reward function: `python -m mrlhf.rl.reward_child FILE.py:NAME OPTIONS READ_FD WRITE_FD`.

A supervisor and its child, the worker. The worker writes one answer to WRITE_FD for each request from READ_FD, with the
request's number; answer 0 says whether the function was loaded. What the worker prints goes to the log. When the worker
ends, or the trainer does, the supervisor kills every process that the function has left, in whatever session, and ends
like the worker. rewards/process.py starts it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from mrlhf.config.user_file import printable
from mrlhf.errors import MrlhfError
from mrlhf.rl.rewards.kinds import load_function, parse_source, score_with_function

_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
OPEN_FILES, FILE_BYTES = 1024, 1 << 30
LOG_BYTES = 64 << 20  # what one process may write to its log


def limit_resources(memory_mib: int) -> None:
    """Sets the resource limits of this process; limits that are lower already stay. memory_mib: 0 for no limit."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_FSIZE: FILE_BYTES}
    if memory_mib:
        wanted[resource.RLIMIT_AS] = memory_mib << 20
    for kind, value in wanted.items():
        soft, hard = resource.getrlimit(kind)
        lowest = min(v for v in (value, soft, hard) if v != resource.RLIM_INFINITY)
        resource.setrlimit(kind, (lowest, lowest))
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    faulthandler.register(signal.SIGUSR1)  # the parent asks for the stacks before it kills this process


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def read_message(fd: int) -> Any:
    """The next message; None if the other side has closed its end."""
    head = _read(fd, 8)
    body = None if head is None else _read(fd, int.from_bytes(head, "little"))
    return None if body is None else msgspec.msgpack.decode(body)


def _read(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def write_message(fd: int, message: Any) -> None:
    body = msgspec.msgpack.encode(message)
    data = memoryview(len(body).to_bytes(8, "little") + body)
    while data:
        data = data[os.write(fd, data) :]


def _close_all(*fds: int) -> None:
    for fd in fds:
        with suppress(OSError):  # the function may have closed it
            os.close(fd)


def _error_message(error: MrlhfError) -> dict[str, Any]:
    parts = [part and printable(part) for part in (error.what, error.where, error.expected, error.fix)]
    if error.__cause__ is not None:
        with suppress(Exception):  # the function may have closed stderr
            sys.stderr.write("".join(traceback.format_tb(error.__cause__.__traceback__)) + f"{parts[0]}\n")
    return {"error": parts}


def serve_requests(spec: str, read_fd: int, write_fd: int) -> None:
    """The worker: answers until the trainer closes its end."""
    try:
        function = load_function(parse_source(spec))
    except MrlhfError as error:
        write_message(write_fd, {"number": 0, **_error_message(error)})
        return
    write_message(write_fd, {"number": 0})
    while (request := read_message(read_fd)) is not None:
        try:
            answer: dict[str, Any] = {"scores": score_with_function(function, source=spec, **request["columns"])}
        except MrlhfError as error:
            answer = _error_message(error)
        write_message(write_fd, {"number": request["number"], **answer})


def supervise(worker: int, *, read_fd: int, output_fd: int, log: str | None) -> NoReturn:
    """Waits for the worker, or for the trainer to close its end of READ_FD; then leaves no process behind."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the worker's end is the supervisor's
    copier = threading.Thread(target=_copy_output, args=(output_fd, log), daemon=True)
    copier.start()
    threading.Thread(target=_kill_after_hangup, args=(worker, read_fd), daemon=True).start()
    while (ended := os.wait())[0] != worker:
        pass  # an orphan
    _kill_children()
    copier.join(1.0)
    status = os.waitstatus_to_exitcode(ended[1])
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL has no other action
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _kill_after_hangup(worker: int, read_fd: int) -> None:
    poll = select.poll()
    poll.register(read_fd, 0)  # POLLHUP is always reported
    poll.poll()
    os.kill(worker, signal.SIGKILL)


def _kill_children() -> None:
    """Kills until there are none: the children of a killed one become ours."""
    with suppress(ChildProcessError):
        while True:
            for pid in _children():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            os.wait()


def _children() -> list[int]:
    """The processes whose parent is this one, from Linux's /proc."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                pids.append(int(path.parent.name))
    return pids


def _copy_output(output_fd: int, log: str | None) -> None:
    """Copies to the log, or to stderr; drops what is beyond LOG_BYTES, and what a full disk refuses."""
    log_fd, room = 2, LOG_BYTES
    with suppress(OSError):
        log_fd = 2 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    while data := os.read(output_fd, 1 << 16):
        if room > 0:
            room -= len(data)
            with suppress(OSError):
                os.write(log_fd, data if room > 0 else data + b"\n[further output is dropped]\n")


def main(spec: str, options: str, read_fd: int, write_fd: int) -> None:
    given = json.loads(options)
    for fd in (read_fd, write_fd):
        os.set_inheritable(fd, False)  # else a program that the function starts would hold them
    _prctl(_ADOPT_ORPHANS, 1)
    output_read, output_write = os.pipe()
    if worker := os.fork():
        os.close(write_fd)
        os.close(output_write)
        supervise(worker, read_fd=read_fd, output_fd=output_read, log=given["log"])
    os.close(output_read)
    for fd in (1, 2):
        os.dup2(output_write, fd)
    os.close(output_write)
    limit_resources(given["memory_mib"])
    # a fork that the function or its signal handler makes can neither answer nor take a request, whenever it comes back
    os.register_at_fork(after_in_child=partial(_close_all, read_fd, write_fd))
    serve_requests(spec, read_fd, write_fd)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
