"""PPO that nobody disturbs, and the same killed in a rollout, in a reward and in an update, and out of memory in an
update, each time gone on with; then SFT out of memory in a step. Prints a JSON of what was seen.

usage: phases_program.py DIRECTORY STEP ppo --section.key VALUE ... -- sft --section.key VALUE ...

The runs are DIRECTORY/whole and DIRECTORY/broken, broken in STEP, and DIRECTORY/sft. Every run is forked off one that
has imported everything. Its rollouts.jsonl holds every rollout that was drawn, those that a kill has lost too: the
step, the prompts' numbers, and of every answer the SHA-256 of prompt ids and answer tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm.v1.engine.llm_engine  # noqa: F401  (before the forks)

import mrlhf.rl.ppo
from mrlhf.cli import main as mrlhf_main
from mrlhf.parallel import watch
from mrlhf.rl.rewards.process import RewardProcess
from mrlhf.training.stopping import Stopper
from mrlhf.training.trainer import Trainer

KILLS: dict[str, tuple[type, str, int]] = {  # in the phase: at the call of that number of what
    "gen": (Stopper, "requested", 6),  # asked before each of vLLM's steps
    "reward": (RewardProcess, "_receive", 1),  # the function has been given its answers
    "update_actor": (Trainer, "step", 3),  # critic and two mini-batches are behind it
}
TAKEN: list[torch.Tensor] = []
FULL = ("update_critic", Trainer, "step", 3)
_now = "start"


def follow_phases() -> None:
    phase = watch.phase

    def followed(name: str) -> None:
        global _now
        _now = name
        phase(name)

    watch.phase = followed


def kill() -> None:
    print(f"killed in {_now}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_memory() -> None:
    """The process gets 2 MiB more of the system; then all that malloc has left but for 1 MiB is taken,
    in pieces of 128 KiB.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))
    with contextlib.suppress(RuntimeError):
        while True:
            TAKEN.append(torch.empty(1 << 17, dtype=torch.uint8))
    del TAKEN[-8:]


def break_at(fault: Callable[[], None], phase: str, owner: type, name: str, calls: int) -> None:
    """At a call of `owner.name` in the phase, before it does anything."""
    call: Callable[..., Any] = getattr(owner, name)
    left = calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= phase == _now
        if not left:
            fault()
        return call(*args, **kwargs)

    setattr(owner, name, counted)


def record_rollouts(file: Path) -> None:
    generate = mrlhf.rl.ppo.PPO.generate

    def recorded(self: Any, data: Any, rows: list[int], **how: Any) -> Any:
        rollout = generate(self, data, rows, **how)
        digests = [
            hashlib.sha256(json.dumps([p, a.tokens]).encode()).hexdigest()
            for p, a in zip(rollout.prompts, rollout.answers, strict=True)
        ]
        with file.open("a") as f:
            f.write(json.dumps({"step": how["step"], "rows": rows, "sha256": digests}) + "\n")
        return rollout

    mrlhf.rl.ppo.PPO.generate = recorded  # type: ignore[method-assign]


def run(
    directory: Path, args: list[str], broken: tuple[Callable[[], None], str, type, str, int] | None = None
) -> dict[str, Any]:
    """How it ended (signals negative), and whether a process of it was left a little later."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        directory.mkdir(exist_ok=True)
        follow_phases()
        record_rollouts(directory / "rollouts.jsonl")
        if broken is not None:
            break_at(*broken)
        status = 1
        try:
            status = mrlhf_main([*args, "--train.output_dir", str(directory)])
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    end = time.monotonic() + 10
    while (left := _alive(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    return {"status": status, "left": left}


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    directory, step, cut = Path(sys.argv[1]), int(sys.argv[2]), sys.argv.index("--")
    args, sft = sys.argv[3:cut], sys.argv[cut + 1 :]
    found = {"whole": run(directory / "whole", args)}
    for phase, place in KILLS.items():
        found[phase] = run(directory / "broken", args, (kill, f"{phase} of step {step}", *place))
    found["memory"] = run(directory / "broken", args, (fill_memory, f"{FULL[0]} of step {step}", *FULL[1:]))
    found["end"] = run(directory / "broken", args)
    found["sft"] = run(directory / "sft", sft, (fill_memory, "step 3", Trainer, "step", 1))
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
