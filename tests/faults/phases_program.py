"""PPO that nobody disturbs, and the same killed in a rollout, in a reward and in an update, each time gone on with; prints a JSON of what was seen.

usage: phases_program.py DIRECTORY STEP ppo --section.key VALUE ...

The runs are DIRECTORY/whole and DIRECTORY/broken, killed in STEP. Every run is forked off one that has imported everything. Its
rollouts.jsonl holds every rollout that was drawn, those that a kill has lost too: the step, the prompts' numbers, and of every
answer the SHA-256 of prompt ids and answer tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm.v1.engine.llm_engine  # noqa: F401  (before the forks)

import mrlhf.rl.ppo
from mrlhf.cli import main as mrlhf_main
from mrlhf.engine import Trainer
from mrlhf.parallel import watch
from mrlhf.rl.reward_process import RewardProcess
from mrlhf.stopping import Stopper

KILLS: dict[str, tuple[type, str, int]] = {  # in the phase: at the call of that number of what
    "gen": (Stopper, "requested", 6),  # asked before each of vLLM's steps
    "reward": (RewardProcess, "_receive", 1),  # the function has been given its answers
    "update_actor": (Trainer, "step", 3),  # critic and two mini-batches are behind it
}
_now = "start"


def follow_phases() -> None:
    phase = watch.phase

    def followed(name: str) -> None:
        global _now
        _now = name
        phase(name)

    watch.phase = followed


def kill_at(phase: str, owner: type, name: str, calls: int) -> None:
    """SIGKILL to this process at a call of `owner.name` in the phase, before it does anything."""
    call: Callable[..., Any] = getattr(owner, name)
    left = calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= phase == _now
        if not left:
            print(f"killed in {_now}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(owner, name, counted)


def record_rollouts(file: Path) -> None:
    generate = mrlhf.rl.ppo.PPO.generate

    def recorded(self: Any, data: Any, rows: list[int], **how: Any) -> Any:
        rollout = generate(self, data, rows, **how)
        digests = [hashlib.sha256(json.dumps([p, a.tokens]).encode()).hexdigest() for p, a in zip(rollout.prompts, rollout.answers, strict=True)]
        with file.open("a") as f:
            f.write(json.dumps({"step": how["step"], "rows": rows, "sha256": digests}) + "\n")
        return rollout

    mrlhf.rl.ppo.PPO.generate = recorded  # type: ignore[method-assign]


def run(directory: Path, args: list[str], kill: tuple[str, type, str, int] | None = None) -> dict[str, Any]:
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
        if kill is not None:
            kill_at(*kill)
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
    directory, step, args = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    found = {"whole": run(directory / "whole", args)}
    for phase, kill in KILLS.items():
        found[phase] = run(directory / "broken", args, (f"{phase} of step {step}", *kill))
    found["end"] = run(directory / "broken", args)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
