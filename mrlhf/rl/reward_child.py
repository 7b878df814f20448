"""The process of a Python reward function: `python -m mrlhf.rl.reward_child FILE.py:FUNCTION LIMITS READ_FD WRITE_FD`.

It writes one answer to WRITE_FD for each request from READ_FD; the first answer says whether the function was loaded.
rewards/process.py starts it and describes the messages.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
from typing import Any

import msgspec

from mrlhf.errors import MrlhfError
from mrlhf.rl.rewards.kinds import load_function, parse_source, score_with_function

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
OPEN_FILES, FILE_BYTES = 1024, 1 << 30


def limit_resources(memory_mib: int) -> None:
    """Sets the resource limits of this process; limits that are lower already stay. memory_mib: 0 for no limit."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_FSIZE: FILE_BYTES}
    if memory_mib:
        wanted[resource.RLIMIT_AS] = memory_mib << 20
    for kind, value in wanted.items():
        soft, hard = resource.getrlimit(kind)
        lowest = min(v for v in (value, soft, hard) if v != resource.RLIM_INFINITY)
        resource.setrlimit(kind, (lowest, lowest))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    faulthandler.register(signal.SIGUSR1)  # the parent asks for the stacks before it kills this process


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


def _error_message(error: MrlhfError) -> dict[str, Any]:
    return {"error": [error.what, error.where, error.expected, error.fix]}


def main(spec: str, limits: str, read_fd: int, write_fd: int) -> None:
    limit_resources(json.loads(limits)["memory_mib"])
    try:
        function = load_function(parse_source(spec))
    except MrlhfError as error:
        write_message(write_fd, _error_message(error))
        return
    write_message(write_fd, {"loaded": True})
    while (request := read_message(read_fd)) is not None:
        try:
            answer: dict[str, Any] = {"scores": score_with_function(function, source=spec, **request)}
        except MrlhfError as error:
            answer = _error_message(error)
        write_message(write_fd, answer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
