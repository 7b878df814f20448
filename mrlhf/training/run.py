"""The loop that pretrain, sft, rm and dpo share: data -> step -> log -> evaluate -> save. A stage brings its loss."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint.manager import Saver, best_of
from mrlhf.checkpoint.source import restore_randomness, to_resume
from mrlhf.config.load import dump_yaml
from mrlhf.config.options import SFTStage, TrainingConfig
from mrlhf.data.blend import Dataset, names_of, rows_of, sample_places, sources_of
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.data.order import Mix, Order
from mrlhf.memory.tracker import Memory
from mrlhf.models.layers.router_losses import Count, make_balance
from mrlhf.observe import heartbeat, metrics
from mrlhf.observe.loss_spikes import SpikeDetector
from mrlhf.observe.tracker import Tracker
from mrlhf.parallel import device, state, watch
from mrlhf.training import preflight
from mrlhf.training.resume import check_resume, data_position, describe_run, go_on
from mrlhf.training.stopping import EXIT_STOPPED, Stopper
from mrlhf.training.trainer import LossFn, Trainer


def make_order(config: TrainingConfig, data: Dataset) -> Order:
    """Rows of every step; what the checkpoint arithmetic and the dry run count with too."""
    rows = [rows_of(source, packing=config.data.packing) for source in sources_of(data)]
    mix = Mix.from_weights(rows, [s.weight for s in config.data.train], [s.epochs for s in config.data.train])
    return Order(
        mix,
        global_batch_size=config.train.global_batch_size,
        num_epochs=config.train.num_epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
    )


def source_epochs(order: Order, data: Dataset, consumed: list[int]) -> dict[str, float]:
    """data/<source>/epoch of a blend: passes over each source after so many of its rows."""
    parts = sources_of(data)
    if len(parts) == 1:
        return {}
    counts = zip(names_of([p.prefix for p in parts]), consumed, order.mix.rows, strict=True)
    return {f"data/{name}/epoch": n / rows for name, n, rows in counts}


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def say(text: str) -> None:
    """One line on rank 0."""
    if state.is_main():
        print(text, flush=True)


def guard(config: TrainingConfig, *, began: float, store: dist.Store | None = None, rank: int | None = None) -> Stopper:
    """Signals, the wall-clock budget (from `began`, time.monotonic()), the heartbeat of a run and where its ranks' stacks go when one hangs;
    after torch.distributed was started. store, rank: see Stopper."""
    output_dir = Path(config.train.output_dir)
    watch.log_to(output_dir / "logs")
    heartbeat.start(output_dir, rank=dist.get_rank() if rank is None else rank)
    return Stopper(budget_minutes=config.train.exit_duration_minutes, began=began, store=store, rank=rank)


def all_is_built() -> None:
    """Before the first step: what is there stays as long as the run. Garbage collections, a full one in each of Megatron's saves, pass over it (0.2 s)."""
    gc.collect()
    gc.freeze()


def leave(tracker: Tracker, saver: Saver, text: str, *, status: int = 0) -> int:
    """Collective. The end of a run, complete or stopped; returns the exit status."""
    saver.finish()
    tracker.close()
    heartbeat.stop()
    say(text)
    state.shutdown()
    return status


def make_tracker(stage: str, config: TrainingConfig, *, total_steps: int, done: int) -> Tracker:
    """The run directory's writer; `done` finished steps."""
    return Tracker(
        config.train.output_dir,
        config_yaml=dump_yaml(config),
        env={"device": device.current().describe(), "world_size": state.world_size()},
        is_main=state.is_main(),
        stage=stage,
        total_steps=total_steps,
        start_step=done,
        log_interval=config.logging.log_interval,
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        mlflow_experiment=config.logging.mlflow_experiment,
    )


def performance(trainer: Trainer, memory: Memory, *, tokens: int, mean_length: float, seconds: float, world: int) -> dict[str, float]:
    """perf/*, time/step_s and memory/*; `tokens` read by all ranks in `seconds`."""
    tflops = trainer.spec.flops_per_token(mean_length) * tokens / seconds / world / 1e12
    found = {
        "time/step_s": seconds,
        "perf/tokens_per_s_per_gpu": tokens / seconds / world,
        "perf/tflops": tflops,
        "memory/max_reserved_gib": memory.reserved,
    }
    if device.current().is_cuda and "H100" in torch.cuda.get_device_name():
        found["perf/mfu"] = tflops / 989.0  # dense bf16 of an H100 SXM
    return found


def report_spike(detector: SpikeDetector, loss: float, *, step: int, trainer: Trainer, data: Dataset) -> dict[str, float]:
    """train/loss_spike of one step; for a spike also a line with the samples of the worst micro-batches. Collective."""
    wrong = detector.meet(loss)
    is_spike = state.on_any_rank(wrong is not None)  # tensor-parallel ranks may have computed losses that differ in the last bit
    if is_spike:
        losses = trainer.micro_batch_losses()
        high = [found for found in losses if found[0] > loss / 2] or losses  # often it is one among many
        worst = "; ".join(f"{mean:.4f} with {sample_places(data, samples)}" for mean, samples in high[:3])
        say(f"loss spike at step {step}: {wrong or f'{loss:.4f}'}; micro-batches: {worst}")
    return {"loss_spike": float(is_spike)}


def evaluate(trainer: Trainer, loader: Loader, loss_fn: LossFn, before: Callable | None = None) -> dict[str, float]:
    """Every row of the set once."""
    found = []
    for rows in loader.in_order():
        batches = loader.micro_batches(rows)
        if before:
            before(loader, batches)
        found.append(trainer.evaluate(batches, loss_fn))
    partials = metrics.merge(found)
    return {f"eval/{k}": v for k, v in metrics.finalize(partials).items()}


def train(
    stage: str,
    config: TrainingConfig,
    *,
    head: str,
    make_loss: Callable[[Trainer, Loader], LossFn],
    count: Count,
    make_eval_loss: Callable[[Trainer, Loader], LossFn] | None = None,
    before_step: Callable[[Loader, list[MicroBatch]], None] | None = None,
    finish: Callable[[Trainer, Loader], dict[str, Any]] | None = None,
) -> int:
    """Run a supervised stage from its configuration to its last checkpoint; returns the exit status (EXIT_STOPPED where it was stopped).

    `make_loss(trainer, loader)` gives the loss function (called before the first step, with the starting weights), `count` what it counts,
    `make_eval_loss` the loss function of the evaluation where it measures more;
    `before_step(loader, batches)` may prepare it for a step; `finish(trainer, eval_loader)` gives what goes into
    the last checkpoint's metadata. Started again with the same configuration it goes on from the newest checkpoint.
    """
    began = time.monotonic()
    run = preflight.check_run(stage, config, world=state.world_size())
    output_dir = Path(config.train.output_dir)
    check_resume(config, output_dir)
    layout = state.initialize(config.parallel, seed=config.train.seed)
    stopper = guard(config, began=began)
    _, dp, _ = layout.coordinates(dist.get_rank())
    say(f"device: {device.current().describe()}")
    say(layout.describe(config.train))

    for note in run.notes:
        say(note)

    def make_loader(data: Dataset) -> Loader:
        return Loader(
            data,
            packing=config.data.packing,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=dp,
            dp_size=layout.dp,
            pad_multiple=state.pad_multiple(config.parallel),
            slice_multiple=state.slice_multiple(config.parallel),
            padding_side=config.data.padding_side,
            max_tokens=config.train.max_tokens_per_micro_batch,
        )

    loader = make_loader(run.train)
    eval_loader = make_loader(run.eval) if run.eval is not None else None
    order = make_order(config, run.train)
    saver = Saver(output_dir, config.checkpoint)
    resumed = to_resume(output_dir, total_steps=order.total_steps, verify=config.checkpoint.verify)
    done = 0 if resumed is None else int(resumed.manifest["step"])
    if done >= order.total_steps:
        heartbeat.stop()
        say(f"already finished: {output_dir / 'checkpoints'}")
        state.shutdown()
        return 0
    if resumed is not None:
        where, allowed = str(resumed.path), config.train.allow_changes
        go_on(order, run.train, resumed.manifest, where=where, hf_dir=run.source.hf_dir, allowed=allowed)
    random_init = config.model.init == "random"
    memory = Memory(config, spec=run.source.spec, rank=dist.get_rank(), world=layout.world)
    with memory("build"):
        trainer = Trainer(
            run.source,
            config.parallel,
            config.optim,
            head=head,
            dtype=config.model.dtype,
            seed=config.train.seed,
            total_steps=order.total_steps,
            random_init=random_init,
            on_nonfinite=config.train.on_nonfinite,
            neftune_alpha=config.sft.neftune_alpha if isinstance(config, SFTStage) else 0.0,
            balance=make_balance(config.model, count),
        )
    say(f"model: {run.source.spec.describe()}, {config.model.dtype}, Adam: {trainer.adam}")
    with memory("prepare"):
        loss_fn = make_loss(trainer, loader)
        eval_loss_fn = (make_eval_loss or make_loss)(trainer, eval_loader) if eval_loader is not None else None

    if resumed is not None:
        with memory("build"):
            trainer.resume(resumed.path, done, resumed.manifest["scheduler"])
        restore_randomness(resumed)
        say(f"resumed from {resumed.path}")
    tracker = make_tracker(stage, config, total_steps=order.total_steps, done=done)

    best, described = best_of(config.checkpoint), describe_run(stage, config, layout, run.source.hf_dir)

    spikes = SpikeDetector(config.train.loss_spike_threshold, resumed.manifest.get("recent_losses", []) if resumed is not None else [])

    def save(step: int, extra: dict[str, Any]) -> None:
        last = step == order.total_steps
        part = trainer.part(with_optimizer=not last or config.checkpoint.save_optimizer)
        content = {**described, "scheduler": trainer.scheduler.num_steps, **data_position(order, run.train, order.consumed(step)), **extra}
        content["recent_losses"] = spikes.recent
        with memory("save", step):
            saver.save(step, [part], content, last=last)

    all_is_built()
    for step in range(done + 1, order.total_steps + 1):
        watch.phase(f"step {step}")
        start = time.perf_counter()
        batches = loader.micro_batches(order.rows(step))
        waited = time.perf_counter() - start
        with heartbeat.phase("step", step), memory("step", step):
            if before_step:
                before_step(loader, batches)
            found = trainer.step(batches, loss_fn)
        if config.train.loss_spike_threshold:
            found |= report_spike(spikes, found["loss"], step=step, trainer=trainer, data=run.train)
        seconds = time.perf_counter() - start
        lengths = [n for b in batches for n in b.lengths]
        log = {f"train/{k}": v for k, v in found.items()} | {"train/epoch": order.epoch(step), "time/data_s": waited}
        log |= source_epochs(order, run.train, order.consumed(step))
        # this rank's share stands for the others'
        log |= performance(
            trainer, memory, tokens=sum(lengths) * layout.dp, mean_length=sum(lengths) / len(lengths), seconds=seconds, world=layout.world
        )
        tracker.log(step, log | saver.waited())
        saver.poll()
        last = step == order.total_steps
        to_save = last or _due(step, config.checkpoint.save_interval)
        extra: dict[str, Any] = {}
        if eval_loader is not None and eval_loss_fn is not None and (last or _due(step, config.train.eval_interval) or (best and to_save)):
            watch.phase(f"evaluation after step {step}")
            with heartbeat.phase("evaluate", step), memory("evaluate", step):
                values = evaluate(trainer, eval_loader, eval_loss_fn, before_step)
            tracker.log(step, values)
            extra["eval"] = {key: value for key, value in values.items() if math.isfinite(value)}  # JSON has no nan
        if to_save:
            save(step, extra | (finish(trainer, eval_loader or loader) if finish and last else {}))
        if not last and stopper.agreed(next_s=time.perf_counter() - start + saver.seconds):
            if saver.last_step != step:
                save(step, {})
            return leave(tracker, saver, stopper.describe(step), status=EXIT_STOPPED)
    return leave(tracker, saver, f"finished: {output_dir / 'checkpoints'}")
