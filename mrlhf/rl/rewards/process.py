"""Runs a Python reward function in its own process, so that a fault in it cannot harm the trainer.

The process has a memory limit, a time limit for each call, and an environment without secrets. Two pipes carry data as
msgpack, never pickle; requests are numbered, and an answer has the number of its request. What the function prints goes
to a log. This isolates accidents (an endless loop, a memory bomb, os._exit, a crash in a C library, a fork that comes
back or stays). It is not a sandbox: the function has your rights, your files and your network.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mrlhf.errors import ConfigError, RewardError
from mrlhf.rl.rewards.kinds import RewardSource, check_scores

# The environment variables that the function's process gets; all others, which may hold secrets, are dropped.
_PASSED_VARIABLES = frozenset(
    "PATH HOME USER LANG TZ TMPDIR VIRTUAL_ENV LD_LIBRARY_PATH OMP_NUM_THREADS HF_HOME HF_HUB_OFFLINE SSL_CERT_FILE "
    "SSL_CERT_DIR http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY".split()
)
_ANSWER_BYTES = 1 << 20  # the largest answer, besides its scores
_STACKS_S, _EXIT_S = 0.5, 5.0  # time to write stacks, and to end what the function has left


class _Answer(msgspec.Struct):
    number: int
    scores: list[float] | None = None
    error: tuple[str, str | None, str | None, str | None] | None = None


class RewardProcess:
    """The function of `source`, loaded in a new process.

    timeout_s: for one call (and for loading the file). memory_mib: limit of the address space, 0 for none.
    env: names of further environment variables to pass. log: a file for what the function prints; None: stderr.

    Raises ConfigError if the function cannot be loaded or a variable is not set.
    """

    def __init__(self, source: RewardSource, *, timeout_s: float = 300.0, memory_mib: int = 8192,
                 env: Sequence[str] = (), log: Path | None = None) -> None:
        self.spec, self.timeout_s, self.memory_mib, self.log = source.spec, timeout_s, memory_mib, log
        self._number = 0  # of the last request
        for name in env:
            if name not in os.environ:
                what = f"environment variable {name} for reward function {self.spec!r} is not set"
                raise ConfigError(what, fix=f"export {name}=...")
        names = [name for name in os.environ if name in _PASSED_VARIABLES or name in env or name.startswith("LC_")]
        passed = {name: os.environ[name] for name in names}
        root = str(Path(__file__).resolve().parents[3])
        passed["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        (request_read, self._write), (self._read, answer_write) = os.pipe(), os.pipe()
        options = json.dumps({"memory_mib": memory_mib, "log": None if log is None else str(log)})
        arguments = [self.spec, options, str(request_read), str(answer_write)]
        command = [sys.executable, "-m", "mrlhf.rl.reward_child", *arguments]
        self._process = subprocess.Popen(command, env=passed, stdin=subprocess.DEVNULL,
                                         pass_fds=(request_read, answer_write), start_new_session=True)
        os.close(request_read)
        os.close(answer_write)
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)
        try:
            self._exchange("could not be loaded", None, 0)
        except RewardError as error:
            self.close()
            raise ConfigError(error.what, where=error.where, expected=error.expected, fix=error.fix) from error

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, labels: Sequence[Any],
              prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]) -> list[float]:
        """One score a completion. Raises RewardError, which names the function, if it fails, is too slow or exits."""
        if not completions:
            return []
        columns = {"prompts": prompts, "completions": completions, "labels": labels, "prompt_ids": prompt_ids,
                   "completion_ids": completion_ids}
        self._number += 1
        request = {"number": self._number, "columns": {name: list(values) for name, values in columns.items()}}
        try:
            body = msgspec.msgpack.encode(request)
        except (TypeError, OverflowError, ValueError) as error:
            what = f"the columns for reward function {self.spec!r} cannot be sent: {error}"
            raise RewardError(what, expected="labels of JSON types") from error
        scores = self._exchange("failed", body, len(completions))
        return check_scores(scores, expected=len(completions), source=self.spec)

    def close(self) -> None:
        """Ends the process and all processes that it has started."""
        if self._write < 0:
            return
        os.close(self._write)  # the supervisor ends all, in whatever session they are
        os.close(self._read)
        self._write = self._read = -1
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> RewardProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange(self, failure: str, body: bytes | None, count: int) -> list[float] | None:
        """Sends `body`, if there is one, and reads the answer with `count` scores, within timeout_s.

        failure: a verb for errors.
        """
        deadline = time.monotonic() + self.timeout_s
        try:
            if self._write < 0:
                raise EOFError
            if body is not None:
                self._send(len(body).to_bytes(8, "little") + body, deadline)
            size = int.from_bytes(self._receive(8, deadline), "little")
            if size > _ANSWER_BYTES + 16 * count:
                raise msgspec.DecodeError
            answer = msgspec.msgpack.decode(self._receive(size, deadline), type=_Answer)
        except TimeoutError as error:
            os.killpg(self._process.pid, signal.SIGUSR1)  # the worker writes its stacks to the log
            time.sleep(_STACKS_S)
            self.close()
            raise RewardError(
                f"reward function {self.spec!r} {failure}: it did not answer within {self.timeout_s:g} s",
                expected=f"an answer in time; {self.log or 'the log'} shows its stacks",
                fix=f"--reward.function_timeout_s {2 * self.timeout_s:g}",
            ) from error
        except msgspec.DecodeError as error:
            self.close()
            what = f"reward function {self.spec!r} {failure}: it wrote to the pipe of its answers"
            raise RewardError(what, expected="a function that uses only files that it has opened") from error
        except (EOFError, BrokenPipeError) as error:
            raise RewardError(f"reward function {self.spec!r} {failure}: {self._wait_for_exit()}") from error
        if answer.number != self._number:
            self.close()
            what = f"the answer to request {answer.number} came instead of that to request {self._number}"
            raise RewardError(f"reward function {self.spec!r} {failure}: {what}")
        if answer.error is not None:
            what, where, expected, fix = answer.error
            if "MemoryError" in what and self.memory_mib:
                expected = f"at most {self.memory_mib} MiB of address space"
                fix = f"--reward.function_memory_mib {2 * self.memory_mib}"
            raise RewardError(what, where=where, expected=expected, fix=fix)
        return answer.scores

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._write, select.POLLOUT, deadline)
            view = view[os.write(self._write, view) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._read, select.POLLIN, deadline)
            part = os.read(self._read, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _wait_for_exit(self) -> str:
        """How the process ended, in words."""
        try:
            status = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status is None:
            return "it closed its pipe"
        if status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"its process exited with status {status}"
