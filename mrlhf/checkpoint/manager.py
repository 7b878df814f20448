"""The checkpoints of one run: starts and completes saves, removes old ones, handles failed saves, exports to HF."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint.manifest import step_of, steps_in
from mrlhf.checkpoint.save import Best, Keep, Part, Save, begin_save, clear_unfinished, is_whole, on_main, retain
from mrlhf.config.options import CheckpointConfig
from mrlhf.errors import CheckpointError
from mrlhf.parallel import state

log = logging.getLogger(__name__)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
                   "ROLE_RANK")


def best_criterion(config: CheckpointConfig) -> Best | None:
    return Best(config.best_metric, config.best_is == "highest") if config.best_metric else None


class Saver:
    """Saves to RUN/checkpoints. At most one save is in progress; the next one waits for it.

    Made once when a run starts. Rank 0 then removes the leftovers of killed saves.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self.run_dir, self.directory, self.config = run_dir, run_dir / "checkpoints", config
        self.retention = Keep(config.keep_last, config.keep_every, best_criterion(config))
        self.last_step = 0  # step of the newest checkpoint, complete or in progress; 0 after a failed save
        self.seconds = 0.0  # duration of the longest save so far, from start to rename
        self._waited = 0.0
        self._under_way: Save | None = None
        self.failed_exports: list[str] = []  # names of checkpoints; until `export_missing` only on rank 0
        if state.is_main():
            clear_unfinished(self.directory)
            clear_unfinished(run_dir / "hf")
        dist.barrier()

    def save(self, step: int, parts: list[Part], content: dict[str, Any], *, last: bool = False,
             files: Mapping[str, bytes] | None = None) -> None:
        """Saves a checkpoint. With checkpoint.async_save it returns when the tensors are copied, except for the `last`
        one. Collective.

        Raises CheckpointError if this save or the one before fails and checkpoint.on_save_error is stop, or if it is
        the last.
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
            self._handle_failure(error, last)
            return
        self._under_way.began = start
        self.last_step = step
        if last or not self.config.async_save:
            self.finish(last=last)

    def poll(self) -> None:
        """Completes the save in progress once all ranks have written it or one has failed. Collective."""
        if self._under_way is None:
            return
        start = time.perf_counter()
        worst = torch.tensor(float(self._under_way.status()))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if int(worst) != 1:
            self.finish()
        self._waited += time.perf_counter() - start

    def take_wait_metrics(self) -> dict[str, float]:
        """time/save_s: seconds that the run waited for saves since the last call."""
        waited, self._waited = self._waited, 0.0
        return {"time/save_s": waited} if waited else {}

    def finish(self, *, last: bool = False) -> None:
        """Waits for the save in progress, sets `latest` and `best`, removes old checkpoints, exports. Collective."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        try:
            save.finish()
            on_main(lambda: retain(self.directory, save.target.name, self.retention), save.target)
        except CheckpointError as error:
            save.abandon()
            self._handle_failure(error, last)
            return
        self.seconds = max(self.seconds, time.perf_counter() - save.began)
        if self._exports(save.content["step"], last=last):
            self._export(save.target)
        dist.barrier()

    def _handle_failure(self, error: CheckpointError, last: bool) -> None:
        self.last_step = 0  # a stop request at this step saves again
        if last or self.config.on_save_error == "stop":
            raise error
        if state.is_main():
            log.warning(f"{error}\n  the run continues without it (checkpoint.on_save_error)")

    def _exports(self, step: int, *, last: bool) -> bool:
        every = self.config.export_hf_interval
        return bool(every and step % every == 0) or last and self.config.export_hf_at_end

    def export_missing(self, total_steps: int) -> None:
        """Collective. Makes the exports of existing checkpoints that a killed or failed command has left out.

        Afterwards `failed_exports` is the same on all ranks.
        """
        steps = [p for p in steps_in(self.directory) if self._exports(step_of(p), last=step_of(p) == total_steps)]
        for name in state.from_all_ranks([p.name for p in reversed(steps) if is_whole(p)] if state.is_main() else []):
            self._export(self.directory / name)
        self.failed_exports = state.from_all_ranks(self.failed_exports)

    def _export(self, checkpoint: Path) -> None:
        """Collective. Exports in a separate process of rank 0, since a conversion needs another layout than the run. A
        failure is a warning until the run closes: the checkpoint exists.

        The ranks ask each other again and again, since a large model takes longer than one collective may wait.
        """
        target, process = self.run_dir / "hf" / checkpoint.name, None
        if state.is_main():
            with suppress(OSError):
                target.rmdir()  # an empty directory is no export
        if state.is_main() and not target.exists() and checkpoint.name not in self.failed_exports:
            environment = {k: v for k, v in os.environ.items()
                           if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")}
            process = subprocess.Popen([sys.executable, "-m", "mrlhf.export", str(checkpoint), str(target)],
                                       env=environment | {"MRLHF_DEVICE": "cpu"}, stdout=subprocess.DEVNULL)
        while state.on_any_rank(process is not None and process.poll() is None):
            time.sleep(0.1)
        if process is not None and process.returncode:
            shutil.rmtree(target.with_name(target.name + ".tmp"), ignore_errors=True)
            self.failed_exports.append(checkpoint.name)
            log.warning(f"the HF export of {checkpoint} failed with status {process.returncode}; its reason is above")
        elif process is not None:
            log.info(f"HF export: {target}")
