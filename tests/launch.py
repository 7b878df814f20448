"""Programs of the tests, each in processes of its own that need not import anything: they are forked off one that has.

`launch` gives the work to a server, a process that has imported mrlhf and everything under it, with vLLM where asked
for: of the seconds that a rank takes to start, its imports take 3.4 of CPU, with vLLM 8.5. A server lives as long as
this process and does one job at a time: it forks, and the fork becomes the program, or torchrun's agent with ranks
forked in their turn. What a job leaves in memory ends with it. `python tests/launch.py [MODULE ...]` is a server: a job
a line on stdin as JSON; its process and its status come on stdout.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# with what a run imports when it is under way
IMPORTS = (
    "mrlhf.cli",
    "mrlhf.rl.ppo",
    "mrlhf.dpo",
    "mrlhf.rm",
    "mrlhf.pretrain",
    "mrlhf.commands.score",
    "mrlhf.export",
)
REHEARSAL = ("transformers.models.auto.configuration_auto",)  # tests/cuda/rehearse_program.py makes configurations
VLLM = ("vllm.v1.engine.llm_engine",)
_servers: dict[tuple[bool, str], subprocess.Popen[bytes]] = {}  # by vLLM, and the device that they chose


def launch(
    ranks: int, command: tuple[object, ...], *, env: dict[str, str], vllm: bool, timeout: float
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`, or `torchrun --nproc-per-node RANKS COMMAND` for more than one rank,
    from the repository's root.

    The command is a program's file or `-m MODULE`, then its arguments.
    Raises TimeoutExpired, with all of the job killed.
    """
    server = _server(vllm, env)
    assert server.stdin is not None
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, name) for name in ("stdout", "stderr")]
        job = {"ranks": ranks, "command": [str(c) for c in command], "env": env, "files": [str(f) for f in files]}
        server.stdin.write(json.dumps(job).encode() + b"\n")
        pid = _reply(server)
        try:
            status = _reply(server, timeout)
        except BaseException:  # also the test's own time limit, and Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _reply(server)
            raise
        return subprocess.CompletedProcess(command, status, *(f.read_text() for f in files))


def _server(vllm: bool, env: dict[str, str]) -> subprocess.Popen[bytes]:
    kind = vllm, env["MRLHF_DEVICE"]
    if kind not in _servers:
        command = [sys.executable, __file__, *IMPORTS, *(VLLM if vllm else ())]
        command += REHEARSAL if env["MRLHF_DEVICE"] == "rehearsal" else ()
        # without a configuration of vLLM's logging at import, a run can still make its own
        more = {"VLLM_CONFIGURE_LOGGING": "0"}
        _servers[kind] = subprocess.Popen(
            command,
            bufsize=0,
            cwd=ROOT,
            env=env | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(_end, _servers[kind])
    return _servers[kind]


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def _reply(server: subprocess.Popen[bytes], timeout: float = 120) -> int:
    assert server.stdout is not None
    if not select.select([server.stdout], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired(server.args, timeout)
    line = server.stdout.readline()
    assert line, f"the server of launch.py has ended with {server.wait()}"
    return int(line)


def serve(imports: list[str]) -> dict[str, Any] | None:
    """Returns twice and more: in every fork with its job, in the end without one."""
    before = dict(os.environ)
    for name in imports:
        importlib.import_module(name)
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.collect()
    gc.freeze()  # the forks' garbage collection leaves these pages shared
    replies = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        if (pid := os.fork()) == 0:
            os.setsid()
            os.close(replies)
            for fd, file in enumerate((os.devnull, *job["files"])):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), fd)
            os.environ.clear()
            os.environ.update(changed | job["env"])
            return job
        os.write(replies, f"{pid}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(replies, f"{status}\n".encode())
    return None


def execute(command: list[str]) -> None:
    """What `python COMMAND` does; with the log on the console, as the command line has it."""
    from mrlhf.observe import log

    log.set_up()
    module, sys.argv = command[0] == "-m", command[command[0] == "-m" :]
    sys.path[0] = str(ROOT if module else Path(command[0]).resolve().parent)
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def rank(command: list[str]) -> None:
    """In a rank. The agent waits for a function's result, and what Python would do at its end is not done in a fork of
    multiprocessing.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the agent's handlers
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    try:
        execute(command)
    except SystemExit as e:
        if e.code:
            raise
    except Exception:
        traceback.print_exc()
        raise
    finally:
        atexit._run_exitfuncs()


def ranks(count: int, command: list[str]) -> None:
    """`torchrun --nproc-per-node COUNT COMMAND` on a free port: its agent in this process. Raises ChildFailedError."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"test_{os.getpid()}_{time.monotonic_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, rank)(command)


if __name__ == "__main__":
    job = serve(sys.argv[1:])
    if job is not None:
        if job["ranks"] == 1:
            execute(job["command"])
        else:
            ranks(job["ranks"], job["command"])
