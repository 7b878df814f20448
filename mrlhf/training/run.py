"""A run: opens the parts that every training stage needs, and does the work around each step's computation.

A stage is a loop over `steps()`, or over `batches()` of a `SupervisedRun`:

    run = SupervisedRun(config, head="lm", count=...)
    if run.finished:
        return run.close()
    for step, batches in run.batches():
        with run.phase("step", step):
            metrics = run.trainer.step(batches, loss_fn)
        run.log_step(step, metrics)
        if run.due_evaluation(step):
            run.evaluate(step, loss_fn)
        if run.due_save(step):
            run.save(step)
    return run.close()

All methods are collective: every rank calls them in the same order.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrlhf.checkpoint.manager import Saver, best_criterion
from mrlhf.checkpoint.save import Part
from mrlhf.checkpoint.source import restore_randomness, to_resume
from mrlhf.config.dump import dump_yaml
from mrlhf.config.options import SFTStage, TrainingConfig
from mrlhf.data.blend import Dataset, sample_places
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.errors import CheckpointError
from mrlhf.memory.tracker import Memory
from mrlhf.models.layers.router_losses import Count, make_balance
from mrlhf.observe import heartbeat, metrics
from mrlhf.observe.directory import DirectoryLock
from mrlhf.observe.loss_spikes import SpikeDetector
from mrlhf.observe.tracker import Tracker
from mrlhf.parallel import device, state, watch
from mrlhf.parallel.peak_rates import gpu_name, peak_tflops
from mrlhf.training.batches import (
    data_position,
    few_steps_warning,
    make_order,
    restore_position,
    source_epochs,
    training_batch_plan,
)
from mrlhf.training.phases import Phases
from mrlhf.training.preflight import RunInputs, check_run, verify_data
from mrlhf.training.resume import open_directory, run_manifest
from mrlhf.training.stopping import EXIT_STOPPED, Stopper
from mrlhf.training.trainer import LossFn, Trainer

log = logging.getLogger(__name__)
DEFAULT_SAVE_S = 1800.0  # between saves without checkpoint.save_interval


class Run(ABC):
    """The parts of every training stage: directory, stopper, checkpoints, tracker, phases, the range of steps.

    With the configuration of an earlier run in the same directory it continues after the newest checkpoint (`resumed`,
    of step `done`). `finished`: no step is left, and the stage only closes the run.
    """

    def __init__(self, config: TrainingConfig, inputs: RunInputs, layout: state.Layout, *, total_steps: int,
                 began: float, lock: DirectoryLock | None, store: dist.Store | None = None) -> None:
        """Needs torch.distributed. began: time.monotonic() at the process's start. lock: rank 0's of the directory.
        store: see Stopper.
        """
        self.config, self.inputs, self.layout, self.total_steps = config, inputs, layout, total_steps
        self._lock = lock
        self.output_dir = Path(config.train.output_dir)
        watch.write_stacks_to(self.output_dir / "logs")
        heartbeat.start_beating(self.output_dir, rank=dist.get_rank())
        self.stopper = Stopper(budget_minutes=config.train.exit_duration_minutes, began=began, store=store)
        for line in (f"device: {device.current().summary()}", layout.batch_summary(config.train), *inputs.notes):
            log.info(line)
        verify_data(config)
        self.saver = Saver(self.output_dir, config.checkpoint)
        self.resumed = to_resume(self.output_dir, total_steps=total_steps, verify=config.checkpoint.verify)
        self.done = 0 if self.resumed is None else int(self.resumed.manifest["step"])
        self.finished = self.done >= total_steps
        self.status = 0
        self.manifest = run_manifest(config, layout, inputs.source.hf_dir)  # the same in every checkpoint
        self.closing_line = f"{'already ' if self.finished else ''}finished: {self.output_dir / 'checkpoints'}"
        memory = Memory(config, spec=inputs.source.spec, rank=dist.get_rank(), world=layout.world)
        self.phase = Phases(memory, before_end=self.saver.finish)
        self.tracker: Tracker | None = None
        self._evaluation: tuple[int, dict[str, float]] = 0, {}
        self._saved_at, self._save_next = time.monotonic(), False
        if self.finished:
            self._export_missing()

    def steps(self) -> Iterator[int]:
        """The remaining steps. On a stop request it saves and ends early."""
        if self.finished:
            return
        self.tracker = self._make_tracker()
        # Objects from the start live as long as the run. Freezing them saves 0.2 s in each full garbage collection,
        # and every save of Megatron does one.
        gc.collect()
        gc.freeze()
        self._saved_at = time.monotonic()
        for step in range(self.done + 1, self.total_steps + 1):
            self.stopper.start_step()
            self.phase.start_step(step)
            yield step
            if self.status:
                return
            next_s = self.phase.step_seconds() + self.saver.seconds
            if step < self.total_steps and self.stopper.agree_to_stop(next_s=next_s):
                self._evaluation = 0, {}
                self.stop_after(step)
                return
            if self.config.checkpoint.save_interval is None:
                waited = time.monotonic() - self._saved_at + self.phase.step_seconds()
                self._save_next = state.on_any_rank(state.is_main() and waited >= DEFAULT_SAVE_S)
        self._export_missing()

    def _export_missing(self) -> None:
        with self.phase("save", self.total_steps):
            self.saver.export_missing(self.total_steps)

    def stop_after(self, step: int) -> None:
        """Saves `step` unless a checkpoint of it exists, and ends `steps()`. Raises CheckpointError if that fails."""
        if step not in (self.done, self.saver.last_step):
            self.saver.config = replace(self.saver.config, on_save_error="stop")
            self.save(step)
        self.status, self.closing_line = EXIT_STOPPED, self.stopper.message(step)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl, and completes a background save once all ranks have written theirs."""
        assert self.tracker is not None
        self.tracker.log(step, {**values, **self.saver.take_wait_metrics()})
        self.saver.poll()

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Logs eval/* of a step. A checkpoint of the same step stores them."""
        assert self.tracker is not None
        self.tracker.log(step, values)
        # JSON has no NaN
        self._evaluation = step, {key: value for key, value in values.items() if math.isfinite(value)}

    def due_evaluation(self, step: int) -> bool:
        if self.inputs.eval is None:
            return False
        interval, best = self.config.train.eval_interval, best_criterion(self.config.checkpoint)
        return step == self.total_steps or _is_multiple(step, interval) or (best is not None and self.due_save(step))

    def due_save(self, step: int) -> bool:
        interval = self.config.checkpoint.save_interval
        return step == self.total_steps or (self._save_next if interval is None else _is_multiple(step, interval))

    @abstractmethod
    def save(self, step: int) -> None:
        """Saves the checkpoint of a step. A stage passes its content to `write_checkpoint`."""

    def with_optimizer(self, step: int) -> bool:
        return step < self.total_steps or self.config.checkpoint.save_optimizer

    def write_checkpoint(self, step: int, parts: list[Part], content: dict[str, Any], *,
                         files: Mapping[str, bytes] | None = None) -> None:
        """content: the manifest's entries besides `self.manifest`. files: further files of the checkpoint, by name."""
        manifest = self.manifest | content
        if self._evaluation[0] == step:
            manifest["eval"] = self._evaluation[1]
        self.saver.save(step, parts, manifest, last=step == self.total_steps, files=files)
        self._saved_at = time.monotonic()

    def close(self) -> int:
        """Ends a run, complete or stopped, in the one right order. Returns the exit status.

        Raises CheckpointError if an export that was asked for is missing.
        """
        self.saver.finish()  # while torch's default group stands, which vLLM's end destroys
        self.close_parts()
        if self.tracker is not None:
            self.tracker.close()
        heartbeat.stop_beating()
        log.info(self.closing_line)
        state.shutdown()
        if self._lock is not None:
            self._lock.release()
        if self.saver.failed_exports and not self.status:
            what = f"no HF export of {', '.join(self.saver.failed_exports)}; the reason is in the log"
            fix = "remove the reason; the same command then trains nothing and makes the export"
            where, expected = str(self.output_dir / "hf"), "the checkpoints are whole"
            raise CheckpointError(what, where=where, expected=expected, fix=fix)
        return self.status

    def close_parts(self) -> None:  # noqa: B027  most stages have none
        """Ends what a stage has started besides. Collective."""

    def _make_tracker(self) -> Tracker:
        options = self.config.logging
        return Tracker(self.output_dir, config_yaml=dump_yaml(self.config),
                       env={"device": device.current().summary(), "world_size": state.world_size()},
                       is_main=state.is_main(), stage=self.config.stage, total_steps=self.total_steps,
                       start_step=self.done, log_interval=options.log_interval, tensorboard=options.tensorboard,
                       wandb_project=options.wandb_project, mlflow_experiment=options.mlflow_experiment)


class SupervisedRun(Run):
    """A run of one model over a data set: pretrain, sft, rm, dpo."""

    def __init__(self, config: TrainingConfig, *, head: str, count: Count) -> None:
        """head: "lm" or "value". count: the weight of a micro-batch in the routers' losses (layers/router_losses.py).

        Raises ConfigError, DataError and CheckpointError, all problems together.
        """
        began = time.monotonic()
        inputs = check_run(config, world=state.world_size())
        lock = open_directory(config)
        if config.train.deterministic:
            device.make_deterministic()
        layout = state.initialize(config.parallel, seed=config.train.seed)
        self.order = make_order(config, inputs.train)
        if state.is_main() and (warning := few_steps_warning(config, self.order, inputs.train)):
            log.warning(warning)
        super().__init__(config, inputs, layout, total_steps=self.order.total_steps, began=began, lock=lock)
        if self.finished:
            return
        if self.resumed is not None:
            allowed, hf_dir = config.train.allow_changes, inputs.source.hf_dir
            manifest, where = self.resumed.manifest, str(self.resumed.path)
            restore_position(self.order, inputs.train, manifest, where=where, hf_dir=hf_dir, allowed=allowed)
        plan = training_batch_plan(config, state.groups())
        self.loader = Loader(inputs.train, plan)
        self.eval_loader = None if inputs.eval is None else Loader(inputs.eval, plan)
        losses = [] if self.resumed is None else self.resumed.manifest.get("recent_losses", [])
        self.spikes = SpikeDetector(config.train.loss_spike_threshold, losses)
        with self.phase("build"):
            self.trainer = self._make_trainer(head, count)
        log.info(f"model: {inputs.source.spec.summary()}, {config.model.dtype}, Adam: {self.trainer.adam}")
        self._peak_tflops = peak_tflops(config.model.dtype)
        if self._peak_tflops is None and device.current().is_cuda:
            log.info(f"no perf/mfu: parallel/peak_rates.py has no {config.model.dtype} rate of {gpu_name()}")

    def _make_trainer(self, head: str, count: Count) -> Trainer:
        config = self.config
        return Trainer(self.inputs.source, config.parallel, config.optim, head=head, dtype=config.model.dtype,
                       seed=config.train.seed, total_steps=self.total_steps, random_init=config.model.init == "random",
                       on_nonfinite=config.train.on_nonfinite,
                       neftune_alpha=config.sft.neftune_alpha if isinstance(config, SFTStage) else 0.0,
                       balance=make_balance(config.model, count))

    def batches(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, this rank's micro-batches) of the remaining steps.

        A resumed run loads its checkpoint here. Before the first batch the trainer has the starting weights, which DPO
        needs for its reference.
        """
        if self.resumed is not None:
            with self.phase("build"):
                self.trainer.resume(self.resumed.path, self.done, self.resumed.manifest["scheduler"])
            restore_randomness(self.resumed)
            log.info(f"resumed from {self.resumed.path}")
        for step in self.steps():
            batches = self.loader.micro_batches(self.order.rows(step))
            self._lengths = [n for batch in batches for n in batch.lengths]
            self._data_seconds = self.phase.step_seconds()
            yield step, batches

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Logs the optimizer step's metrics as train/*, with loss spikes, epochs, throughput and memory."""
        if self.config.train.loss_spike_threshold:
            values |= report_spike(self.spikes, values["loss"], step=step, trainer=self.trainer, data=self.inputs.train)
        logged = {f"train/{name}": value for name, value in values.items()}
        logged |= {"train/epoch": self.order.epoch(step), "time/data_s": self._data_seconds}
        logged |= source_epochs(self.order, self.inputs.train, self.order.consumed(step))
        self.log_metrics(step, logged | self._performance(self.phase.step_seconds()))

    def _performance(self, seconds: float) -> dict[str, float]:
        """perf/*, time/step_s and memory/*, from this rank's tokens times the data-parallel size."""
        tokens, world = sum(self._lengths) * self.layout.dp, self.layout.world
        flops = self.trainer.spec.flops_per_token(sum(self._lengths) / len(self._lengths))
        tflops = flops * tokens / seconds / world / 1e12
        values = {
            "time/step_s": seconds,
            "perf/tokens_per_s_per_gpu": tokens / seconds / world,
            "perf/tflops": tflops,
            "memory/max_reserved_gib": self.phase.memory.reserved,
        }
        if device.current().is_cuda:
            values["memory/device_gib"] = self.phase.memory.device_peak
        if self._peak_tflops is not None:
            values["perf/mfu"] = tflops / self._peak_tflops
        return values

    def evaluate(self, step: int, loss_fn: LossFn, prepare: Callable[[list[MicroBatch]], None] | None = None) -> None:
        """Logs eval/* over every row of the evaluation set, or nothing where a stop request comes meanwhile.

        prepare: called with micro-batches before they run.
        """
        assert self.eval_loader is not None
        results = []
        with self.phase("evaluate", step):
            for rows in self.eval_loader.in_order():
                if state.on_any_rank(self.stopper.requested()):
                    return
                batches = self.eval_loader.micro_batches(rows)
                if prepare is not None:
                    prepare(batches)
                results.append(self.trainer.evaluate(batches, loss_fn))
        self.log_evaluation(step, {f"eval/{k}": v for k, v in metrics.finalize(metrics.merge(results)).items()})

    def save(self, step: int, extra: Mapping[str, Any] | None = None) -> None:
        """Saves model, data position and recent losses. extra: the stage's own entries of the manifest."""
        content = {
            "scheduler": self.trainer.scheduler.num_steps,
            **data_position(self.order, self.inputs.train, self.order.consumed(step)),
            **(extra or {}),
            "recent_losses": self.spikes.recent,
        }
        with self.phase("save", step):
            self.write_checkpoint(step, [self.trainer.part(with_optimizer=self.with_optimizer(step))], content)


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def report_spike(detector: SpikeDetector, loss: float, *, step: int, trainer: Trainer,
                 data: Dataset) -> dict[str, float]:
    """{"loss_spike": 0 or 1} of a step. Logs the samples of the worst micro-batches if it is a spike. Collective."""
    spike = detector.check_loss(loss)
    is_spike = state.on_any_rank(spike is not None)  # tensor-parallel ranks' losses may differ in the last bit
    if is_spike:
        losses = trainer.micro_batch_losses()
        high = [entry for entry in losses if entry[0] > loss / 2] or losses  # often one micro-batch among many
        worst = "; ".join(f"{mean:.4f} with {sample_places(data, samples)}" for mean, samples in high[:3])
        log.info(f"loss spike at step {step}: {spike or f'{loss:.4f}'}; micro-batches: {worst}")
    return {"loss_spike": float(is_spike)}
