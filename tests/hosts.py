"""Two hosts on this machine: network namespaces joined by a cable (veth),
whose processes see each other by that cable alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT, environment

_NUMBER = os.getpid() % 200 + 20  # of the network, so that several test runs do not meet
ADDRESSES = (f"10.213.{_NUMBER}.1", f"10.213.{_NUMBER}.2")
NAMES = (f"mrlhf{_NUMBER}a", f"mrlhf{_NUMBER}b")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Raises OSError with the reason where namespaces are not permitted, or `ip` is missing."""
    if shutil.which("ip") is None:
        raise OSError("no `ip`: install iproute2")
    made = []
    try:
        for name in NAMES:
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", NAMES[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield Host(0), Host(1)
    finally:
        for name in made:
            _ip("netns", "del", name)


def cut_cable() -> None:
    """Packets vanish from now on; nobody is told."""
    _ip("-n", NAMES[0], "link", "set", "cable", "down")


def join_cable() -> None:
    _ip("-n", NAMES[0], "link", "set", "cable", "up")


@dataclass
class Host:
    number: int

    def start(self, log: Path, *args: object, port: int) -> Node:
        """torchrun's agent of this host with one rank, of a job of two hosts. Output goes to `log`."""
        command = [
            "ip", "netns", "exec", NAMES[self.number], sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(self.number),
            "--master-addr", ADDRESSES[0], "--master-port", str(port), *map(str, args),
        ]  # fmt: skip
        with log.open("w") as out:
            env = {**environment(), "GLOO_SOCKET_IFNAME": "cable"}
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Node(process, log)


@dataclass
class Node:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still there after {timeout_s} s:\n{self.text[-6000:]}") from None

    def kill(self) -> None:
        """The agent and its ranks at once, as when a host loses power."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (self.process.pid, *map(int, children)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


def wait_for(what: Path, *nodes: Node, timeout_s: float = 120.0) -> None:
    """Until the file is there. Fails with the output where a node ends before."""
    end = time.monotonic() + timeout_s
    while not what.is_file():
        ended = [n for n in nodes if n.process.poll() is not None]
        if ended or time.monotonic() > end:
            raise AssertionError(f"{what} did not come:\n" + "\n".join(n.text[-4000:] for n in nodes))
        time.sleep(0.02)
