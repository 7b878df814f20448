"""The checkpoints of one run: when a save is complete, what is kept, what happens where one fails, and the HF
exports.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint.save import Best, Keep, Part, Save, begin_save, clear_unfinished, on_main, retain
from mrlhf.config.options import CheckpointConfig
from mrlhf.errors import CheckpointError
from mrlhf.parallel import device, state

log = logging.getLogger(__name__)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
                   "ROLE_RANK")


def best_of(config: CheckpointConfig) -> Best | None:
    return Best(config.best_metric, config.best_is == "highest") if config.best_metric else None


class Saver:
    """Saves step after step into RUN/checkpoints; at most one save is under way, and the next one waits for it.

    Made once when a run starts: rank 0 then removes what killed saves have left.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.run_dir, self.directory, self.config = run_dir, run_dir / "checkpoints", config
        self.keep = Keep(config.keep_last, config.keep_every, best_of(config))
        self.last_step = 0  # of the newest checkpoint that is complete or under way; 0 where the last try failed
        self.seconds = 0.0  # what the longest save so far took, from its beginning to its rename
        self._waited = 0.0
        self._under_way: Save | None = None
        if state.is_main():
            clear_unfinished(self.directory)
            clear_unfinished(run_dir / "hf")
        dist.barrier()

    def save(self, step: int, parts: list[Part], content: dict[str, Any], *, last: bool = False,
             files: Mapping[str, bytes] | None = None) -> None:
        """Collective. With checkpoint.async_save it returns when the tensors are copied; the `last` one is complete
        when this returns.

        Raises CheckpointError where it, or the one before it, cannot be written and checkpoint.on_save_error is stop;
        the last always.
        """
        start = time.perf_counter()
        self._save(step, parts, content, last, files)
        self._waited += time.perf_counter() - start

    def _save(
        self, step: int, parts: list[Part], content: dict[str, Any], last: bool, files: Mapping[str, bytes] | None
    ) -> None:
        self.finish()
        target = self.directory / f"step_{step}"
        start = time.perf_counter()
        try:
            copy = self.config.async_save and not last
            self._under_way = begin_save(target, parts, {**content, "step": step}, copy=copy, files=files)
        except CheckpointError as error:
            self._failed(error, last)
            return
        self._under_way.began = start
        self.last_step = step
        if last or not self.config.async_save:
            self.finish(last=last)

    def poll(self) -> None:
        """Collective, after every step: completes the save under way when all ranks have written, or one has failed."""
        if self._under_way is None:
            return
        start = time.perf_counter()
        worst = torch.tensor(float(self._under_way.status()), device=device.current().name)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if int(worst) != 1:
            self.finish()
        self._waited += time.perf_counter() - start

    def waited(self) -> dict[str, float]:
        """time/save_s: what saves have held up the run since this was asked last."""
        waited, self._waited = self._waited, 0.0
        return {"time/save_s": waited} if waited else {}

    def finish(self, *, last: bool = False) -> None:
        """Collective. Waits for the save under way, points `latest` and `best`, drops what is not kept, exports."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        try:
            save.finish()
            on_main(lambda: retain(self.directory, save.target.name, self.keep), save.target)
        except CheckpointError as error:
            save.abandon()
            self._failed(error, last)
            return
        self.seconds = max(self.seconds, time.perf_counter() - save.began)
        every = self.config.export_hf_interval
        if every and save.content["step"] % every == 0 or last and self.config.export_hf_at_end:
            self._export(save.target)
        dist.barrier()

    def _failed(self, error: CheckpointError, last: bool) -> None:
        self.last_step = 0  # a signal at this step saves once more
        if last or self.config.on_save_error == "stop":
            raise error
        if state.is_main():
            log.warning(f"{error}\n  the run goes on without it (checkpoint.on_save_error)")

    def _export(self, checkpoint: Path) -> None:
        """On rank 0, in a process of its own: a conversion has another layout than the run. A failure is a warning, the
        checkpoint is there.
        """
        target = self.run_dir / "hf" / checkpoint.name
        if not state.is_main() or target.exists():
            return
        environment = {
            k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")
        }
        done = subprocess.run([sys.executable, "-m", "mrlhf.export", str(checkpoint), str(target)], env=environment,
                              capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning(f"no HF export of {checkpoint}: {done.stderr.strip()[-2000:]}")
        else:
            log.info(f"HF export: {target}")
