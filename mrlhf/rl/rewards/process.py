"""A Python reward function in a process of its own, so that its accidents are not the trainer's.

The process has a memory limit, a time limit for each call, and an environment without secrets. Only data crosses (msgpack over
two pipes, no pickle). It is isolation from accidents (a loop that does not end, a memory bomb, os._exit, a crash in a C
library, a fork that stays behind), not a sandbox: the function has your rights, your files and your network.
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

# What a program may need to find its files and behave; everything else, with the secrets, stays behind.
_KEPT = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE",
         "SSL_CERT_FILE", "SSL_CERT_DIR", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")  # fmt: skip
_LAST_WORDS_S = 0.5


class RewardProcess:
    """The function of `source`, loaded in a new process.

    timeout_s: of one call (and of loading the file). memory_mib: of address space, 0 for no limit. env: names of further variables the function may see.

    Raises ConfigError where the function cannot be loaded, or where a variable is not set.
    """

    def __init__(self, source: RewardSource, *, timeout_s: float = 300.0, memory_mib: int = 8192, env: Sequence[str] = ()) -> None:
        self.spec, self.timeout_s, self.memory_mib, self._ended = source.spec, timeout_s, memory_mib, False
        absent = [name for name in env if name not in os.environ]
        if absent:
            raise ConfigError(
                f"environment variable {absent[0]} for reward function {self.spec!r} is not set", fix=f"export {absent[0]}=..."
            )
        kept = {name: value for name, value in os.environ.items() if name in _KEPT or name in env or name.startswith("LC_")}
        kept["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours, theirs = os.pipe(), os.pipe()  # (read, write) of what we send, of what it sends
        limits = json.dumps({"memory_mib": memory_mib})
        command = [sys.executable, "-m", "mrlhf.rl.reward_child", self.spec, limits, str(ours[0]), str(theirs[1])]
        self._process = subprocess.Popen(command, env=kept, stdin=subprocess.DEVNULL, pass_fds=(ours[0], theirs[1]), start_new_session=True)
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)
        try:
            self._answer("could not be loaded")
        except RewardError as error:
            raise ConfigError(error.what, where=error.where, expected=error.expected, fix=error.fix) from error

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], *, labels: Sequence[Any], prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
    ) -> list[float]:  # fmt: skip
        """One score a completion. Raises RewardError naming the function where it fails, takes too long or ends its process."""
        if not completions:
            return []
        columns = {
            "prompts": prompts,
            "completions": completions,
            "labels": labels,
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
        }
        try:
            body = msgspec.msgpack.encode({name: list(values) for name, values in columns.items()})
        except (TypeError, OverflowError, ValueError) as error:
            raise RewardError(
                f"the columns for reward function {self.spec!r} cannot be sent: {error}", expected="labels as JSON has them"
            ) from error
        answer = self._answer("failed", body)
        return check_scores(answer["scores"], expected=len(completions), source=self.spec)

    def close(self) -> None:
        """Ends the process and what it has started."""
        self._kill()
        for fd in (self._write, self._read):
            os.close(fd)
        self._write = self._read = -1

    def __enter__(self) -> RewardProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _answer(self, what: str, body: bytes | None = None) -> Any:
        """Sends `body` and reads the answer to it, all before the time is over."""
        deadline = time.monotonic() + self.timeout_s
        try:
            if body is not None:
                self._send(len(body).to_bytes(8, "little") + body, deadline)
            size = int.from_bytes(self._receive(8, deadline), "little")
            answer = msgspec.msgpack.decode(self._receive(size, deadline))
        except TimeoutError as error:
            os.kill(self._process.pid, signal.SIGUSR1)  # its stacks go to the log
            time.sleep(_LAST_WORDS_S)
            self._kill()
            raise RewardError(
                f"reward function {self.spec!r} {what}: it did not answer within {self.timeout_s:g} s",
                expected="an answer in time; the log shows where it was", fix="--reward.function_timeout_s",
            ) from error  # fmt: skip
        except (EOFError, BrokenPipeError, msgspec.DecodeError) as error:
            raise RewardError(f"reward function {self.spec!r} {what}: {self._end()}") from error
        if "error" in answer:
            found, where, expected, fix = answer["error"]
            if "MemoryError" in found and self.memory_mib:
                expected, fix = f"at most {self.memory_mib} MiB of address space", "--reward.function_memory_mib"
            raise RewardError(found, where=where, expected=expected, fix=fix)
        return answer

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
        found = bytearray()
        while len(found) < size:
            self._wait(self._read, select.POLLIN, deadline)
            part = os.read(self._read, min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    def _end(self) -> str:
        """How the process has ended, in words."""
        try:
            status = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            status = None
        self._kill()
        if status is None:
            return "it closed its pipe"
        if status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"it ended its process with exit status {status}"

    def _kill(self) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # the group is empty already
        finally:
            self._process.wait()
