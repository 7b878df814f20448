"""Runs to break: small ones of SFT and PPO, started in the background, looked at through their files, killed,
and compared.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from conftest import ROOT, environment, metrics

from mrlhf.checkpoint.manifest import check_manifest, read_manifest

TIMES = ("time/", "timing_s/", "perf/", "memory/", "reshard/seconds", "rollout/tokens_per_s")
_MARK = "MRLHF_TEST_RUN"  # in the environment of all that a run starts
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")


def sft(world: Path, steps: int, **more: object) -> list[object]:
    options = {"train.max_steps": steps, "train.global_batch_size": 4, "checkpoint.save_interval": 1, **more}
    return ["sft", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", world / "sft",
            "--optim.lr", 1e-3, "--logging.tensorboard", "false", *flags(options)]  # fmt: skip


def ppo(world: Path, steps: int, **more: object) -> list[object]:
    options = {
        "train.max_steps": steps,
        "train.global_batch_size": 8,
        "checkpoint.save_interval": 1,
        "rollout.max_new_tokens": 12,
        "rollout.n": 2,
        "ppo.epochs": 2,
        **more,
    }
    return ["ppo", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", world / "prompts",
            "--optim.lr", 1e-4, "--rollout.batch_size", 8, "--rollout.kv_cache_mib", 64, "--kl.target", 0.1,
            "--kl.horizon", 200, "--logging.tensorboard", "false",
            "--reward.sources", "examples/rewards/length_penalty.py:length_penalty", *flags(options)]  # fmt: skip


def flags(options: dict[str, object]) -> list[object]:
    return [part for key, value in options.items() for part in (f"--{key}", value)]


class Run:
    """A command in a session of its own. `log` holds what it prints."""

    started: ClassVar[list[Run]] = []  # conftest.py ends what a failed test leaves

    def __init__(
        self, directory: Path, args: list[object], *, ranks: int = 1, launcher: tuple[object, ...] = ()
    ) -> None:
        self.directory, self.args, self.ranks, self.launcher = directory, args, ranks, launcher
        self.log = directory.with_suffix(".log")

    def start(self) -> None:
        for old in self.directory.glob("heartbeat/rank_*.json"):
            old.unlink()
        torchrun = (
            (*TORCHRUN, *self.launcher, "--nproc-per-node", self.ranks) if self.ranks > 1 or self.launcher else ()
        )
        command = [sys.executable, *torchrun, "-m", "mrlhf", *self.args, "--train.output_dir", self.directory]
        with self.log.open("a") as log:
            self._from = log.tell()
            Run.started.append(self)
            marked = environment() | {_MARK: str(self.directory)}
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=marked,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout: float = 300) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"{self.args[0]} did not end in {timeout} s\n{self.output()[-4000:]}") from None

    def finish(self) -> None:
        self.start()
        assert self.wait() == 0, self.output()[-6000:]

    def output(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        """SIGKILL to all that is left of it; torchrun's ranks have sessions of their own."""
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()

    def processes(self) -> list[int]:
        """All that came of it and have not ended."""
        mark, found = f"{_MARK}={self.directory}\0".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # of another user, or gone
                if mark in (folder / "environ").read_bytes() + b"\0":
                    found.append(int(folder.name))
        return found

    def beat(self, rank: int = 0) -> dict[str, Any]:
        """The rank's last heartbeat, {} before the first."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self.directory / f"heartbeat/rank_{rank}.json").read_text())
        return {}

    def steps(self) -> int:
        """Finished ones in metrics.jsonl."""
        with suppress(FileNotFoundError):
            return (self.directory / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def until(self, what: Callable[[], Any], timeout: float = 240) -> Any:
        """What `what` gives as soon as it is true; None where the run has ended before."""
        end = time.monotonic() + timeout
        while not (found := what()):
            if self.process.poll() is not None:
                return None
            assert time.monotonic() < end, self.output()[-4000:]
            time.sleep(0.002)
        return found

    def fresh_steps(self) -> int:
        """Finished ones since it was started last."""
        with self.log.open("rb") as log:
            log.seek(self._from)
            return sum(line.startswith(b"step ") for line in log)

    def saving(self) -> bool:
        return any((self.directory / "checkpoints").glob("step_*.tmp"))

    def kill_a_rank(self, draw: random.Random) -> None:
        """SIGKILL to one rank; torchrun ends the others. With one rank to the run."""
        pid = self.beat(draw.randrange(self.ranks)).get("pid")
        if self.ranks == 1 or pid is None:
            self.end()
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(40)
            end = time.monotonic() + 20
            while self.processes():
                assert time.monotonic() < end, "torchrun has ended and left processes behind"
                time.sleep(0.05)
        self.end()


def _inside_a_save(run: Run, draw: random.Random) -> bool:
    """Waits for a random moment inside one; False where the run has come to its end."""
    while run.until(run.saving):
        time.sleep(draw.random() * 0.03)
        if run.saving():
            return True
    return False


def _outside_of_saves(run: Run, draw: random.Random) -> bool:
    time.sleep(draw.random() * 0.3)
    return bool(run.until(lambda: not run.saving()))


def kill_again_and_again(run: Run, kills: int, draw: random.Random, *, steps: int) -> dict[str, int]:
    """Starts the run and kills a rank `kills` times all along its `steps`, half of them inside a save,
    then lets it end. Returns where it was hit.
    """
    hit = {"in a save": 0, "elsewhere": 0}
    for i in range(kills):
        run.start()
        wanted = draw.randint(1, steps // kills)
        if run.until(lambda wanted=wanted: run.fresh_steps() >= wanted) is None:
            break  # it has come to its end
        if not (_inside_a_save(run, draw) if i % 2 == 0 else _outside_of_saves(run, draw)):
            break
        hit["in a save" if run.saving() else "elsewhere"] += 1
        print(f"{i + 1}: after step {run.steps()}, {hit}", file=sys.stderr, flush=True)
        run.kill_a_rank(draw)
    run.finish()
    return hit


def comparable(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in metrics(run_dir)]


def last(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))


def check_equal(whole: Path, broken: Path) -> None:
    """The same metrics in every digit, the same bytes of weights and optimizer state, nothing unfinished left."""
    assert comparable(whole) == comparable(broken)
    one, two = last(whole), last(broken)
    assert one.name == two.name
    check_manifest(two, verify="hash")
    files = [
        {n: e for n, e in read_manifest(p)["files"].items() if n.endswith((".distcp", ".pt", ".metadata"))}
        for p in (one, two)
    ]
    assert files[0] == files[1] and len(files[0]) >= 3
    assert [p for p in broken.rglob("*.tmp")] == []
    assert [p for p in broken.glob(".*") if p.is_file()] == []
