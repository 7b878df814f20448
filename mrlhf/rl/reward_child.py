"""The process that runs a Python reward function: `python -m mrlhf.rl.reward_child FILE.py:FUNCTION LIMITS READ_FD WRITE_FD`.

It answers each request on READ_FD with one answer on WRITE_FD; the first answer says whether the function could be loaded.
See reward_process.py, which starts it and says what crosses.
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


def limit(memory_mib: int) -> None:
    """What an accident may cost. The soft limits that are lower already stay."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_FSIZE: FILE_BYTES}
    if memory_mib:
        wanted[resource.RLIMIT_AS] = memory_mib << 20
    for kind, value in wanted.items():
        soft, hard = resource.getrlimit(kind)
        lowest = min(v for v in (value, soft, hard) if v != resource.RLIM_INFINITY)
        resource.setrlimit(kind, (lowest, lowest))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    faulthandler.register(signal.SIGUSR1)  # the parent asks where we are before it kills us


def read_message(fd: int) -> Any:
    """The next message; None where the other side has closed."""
    head = _read(fd, 8)
    body = None if head is None else _read(fd, int.from_bytes(head, "little"))
    return None if body is None else msgspec.msgpack.decode(body)


def _read(fd: int, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        part = os.read(fd, min(size - len(found), 1 << 20))
        if not part:
            return None
        found += part
    return bytes(found)


def write_message(fd: int, message: Any) -> None:
    body = msgspec.msgpack.encode(message)
    data = memoryview(len(body).to_bytes(8, "little") + body)
    while data:
        data = data[os.write(fd, data) :]


def _problem(error: MrlhfError) -> dict[str, Any]:
    return {"error": [error.what, error.where, error.expected, error.fix]}


def main(spec: str, limits: str, read_fd: int, write_fd: int) -> None:
    allowed = json.loads(limits)
    limit(allowed["memory_mib"])
    try:
        function = load_function(parse_source(spec))
    except MrlhfError as error:
        write_message(write_fd, _problem(error))
        return
    write_message(write_fd, {"loaded": True})
    while (request := read_message(read_fd)) is not None:
        try:
            answer: dict[str, Any] = {"scores": score_with_function(function, source=spec, **request)}
        except MrlhfError as error:
            answer = _problem(error)
        write_message(write_fd, answer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
