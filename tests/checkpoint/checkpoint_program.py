"""Saves under one layout, goes on under others; prints JSON. Under torchrun with 2 ranks, then alone.

usage: checkpoint_program.py HF_DIR DATA_PREFIX WORK_DIR [SMALL_DISK]

WORK_DIR/DTYPE/checkpoints/step_2 is saved by two ranks (tensor parallel) after two steps of SFT; every layout then
takes steps 3 and 4 from it, the first one without having stopped. Alone it also saves, fails and converts; see `alone`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def make(
    source: str,
    parallel: Any,
    dtype: str,
    head: str = "lm",
    distributed: bool = True,
    lr: float = 1e-3,
    beta2: float = 0.999,
) -> Any:
    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig
    from mrlhf.training.trainer import Trainer

    optim = OptimConfig(
        lr=lr, lr_decay_style="linear", adam_beta2=beta2, weight_decay=0.01, use_distributed_optimizer=distributed
    )
    return Trainer(open_source(source), parallel, optim, head=head, dtype=dtype, seed=1, total_steps=6)


def save(trainer: Any, target: Path, *, dtype: str, step: int, keep_last: int | None = 2) -> None:
    import torch.distributed as dist

    from mrlhf.checkpoint import save as saving

    content = {
        "stage": "sft",
        "step": step,
        "dtype": dtype,
        "scheduler": step,
        "layout": {"world": dist.get_world_size()},
    }
    saving.save(target, [trainer.part()], content)
    if keep_last is not None and dist.get_rank() == 0:
        saving.retain(target.parent, target.name, saving.Keep(keep_last))
    dist.barrier()


def steps(trainer: Any, prefix: str, n: int) -> list[dict[str, float]]:
    import torch.distributed as dist

    from mrlhf.data.batching import BatchPlan
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.loader import Loader
    from mrlhf.parallel import state
    from mrlhf.sft import language_model_loss

    parallel = trainer.config
    layout = state.Layout(
        dist.get_world_size(),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
    )
    _, dp, _ = layout.coordinates(dist.get_rank())
    loader = Loader(
        PackedDataset.open(prefix),
        BatchPlan(packing=True, dp_rank=dp, dp_size=layout.dp, pad_multiple=2, micro_batch_multiple=2),
    )
    batches = [b for rows in loader.in_order() for b in loader.micro_batches(rows)]
    loss = language_model_loss(trainer, aggregation="token")
    return [
        {k: v for k, v in trainer.step(batches, loss).items() if k in ("loss", "grad_norm", "lr")} for _ in range(n)
    ]


def failing_saves(hf: str, prefix: str, work: Path) -> dict[str, Any]:
    """What a `Saver` does when the disk is full or forbidden,
    and that a save in the background is the one in the foreground.
    """
    import os
    import resource
    import shutil
    import time

    from mrlhf.checkpoint import save as saving
    from mrlhf.checkpoint.manager import Saver
    from mrlhf.checkpoint.manifest import read_manifest
    from mrlhf.config.options import CheckpointConfig, ParallelConfig
    from mrlhf.errors import CheckpointError

    found: dict[str, Any] = {}
    trainer = make(hf, ParallelConfig(), "float32")
    content = {"stage": "sft", "dtype": "float32"}

    def names(saver: Saver) -> list[str]:
        return sorted(p.name for p in saver.directory.iterdir())

    def error_of(call: Any) -> str:
        try:
            call()
        except CheckpointError as error:
            return str(error)
        return "none"

    # in the background: the tensors change while they are written, and the next save waits
    front, back = Saver(work / "front", CheckpointConfig()), Saver(work / "back", CheckpointConfig(async_save=True))
    front.save(1, [trainer.part()], content)
    save_tensor = saving.save_tensor

    def slowly(*args: Any) -> int:
        time.sleep(0.02)
        return save_tensor(*args)

    saving.save_tensor = slowly
    back.save(1, [trainer.part()], content)
    steps(trainer, prefix, 1)
    found["while it is written"] = names(back)
    back.poll()
    assert back._under_way is not None, "the save was over before it could be looked at"
    back.save(2, [trainer.part()], content)
    found["when the next has begun"] = [names(back), (back.directory / "latest").read_text()]
    saving.save_tensor = save_tensor
    back.finish()
    found["background"] = [names(back), (back.directory / "latest").read_text()]
    files = [read_manifest(s.directory / "step_1")["files"] for s in (front, back)]
    found["same bytes"] = [files[0] == files[1], len(files[0])]

    # a disk that is full, under each policy, in front and in the background: real errors of the real write
    def limited(saver: Saver, call: Any) -> str:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            return error_of(call)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def written_then_polled(saver: Saver, step: int) -> None:
        saver.save(step, [trainer.part()], content)
        saver._under_way.writer.join()
        saver.poll()  # the step after

    goes_on = Saver(work / "back", CheckpointConfig(async_save=True, on_save_error="continue"))
    found["stop, background"] = limited(back, lambda: written_then_polled(back, 3))
    found["stop, front"] = limited(front, lambda: front.save(3, [trainer.part()], content))
    found["continue"] = limited(goes_on, lambda: written_then_polled(goes_on, 3))
    found["continue, last"] = limited(goes_on, lambda: goes_on.save(3, [trainer.part()], content, last=True))
    found["full"] = [names(front), names(back)]
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=10_000)
    found["no room"] = error_of(lambda: front.save(3, [trainer.part()], content))
    shutil.disk_usage = usage
    if os.geteuid() == 0:
        for folder in (work, front.directory):
            folder.chmod(0o755)
        os.seteuid(65534)
    else:
        front.directory.chmod(0o555)
    found["forbidden"] = error_of(lambda: front.save(3, [trainer.part()], content))
    os.seteuid(0) if os.getuid() == 0 else front.directory.chmod(0o755)
    found["after all"] = names(front)
    front.save(3, [trainer.part()], content)
    found["mended"] = names(front)

    # to_resume: falls back with a warning that names the file
    from mrlhf.checkpoint.source import to_resume

    (front.directory / "step_3/dist/common.pt").write_bytes(b"")
    source = to_resume(work / "front", total_steps=9, verify="hash")
    found["fell back to"] = source and source.path.name
    (front.directory / "step_1/hf/config.json").unlink()
    found["none whole"] = error_of(lambda: to_resume(work / "front", total_steps=9))
    return found


def as_format_2(checkpoint: Path, target: Path) -> Path:
    """A copy as it was written until format 3: `.metadata` with pickle's default protocol."""
    import pickle
    import shutil

    from mrlhf.checkpoint import manifest

    shutil.copytree(checkpoint, target)
    metadata = target / "dist/.metadata"
    metadata.write_bytes(pickle.dumps(pickle.loads(metadata.read_bytes()), protocol=4))
    current, manifest.FORMAT = manifest.FORMAT, 2
    manifest.write_manifest(target, manifest.read_manifest(target))
    manifest.FORMAT = current
    return target


def alone(hf: str, prefix: str, work: Path) -> dict[str, Any]:
    """A save that fails, a value model, a checkpoint of another dtype,
    an optimizer without steps and one that is not distributed.
    """
    import os

    import torch

    from mrlhf.checkpoint import save as saving
    from mrlhf.checkpoint import source as checkpoint
    from mrlhf.checkpoint.manifest import read_manifest
    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.errors import CheckpointError
    from mrlhf.training.trainer import Model

    found: dict[str, Any] = {}
    run, trainer = work / "killed/checkpoints", make(hf, ParallelConfig(), "float32", head="value")
    save(trainer, run / "step_1", dtype="float32", step=1)
    rename = os.rename

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    os.rename = fail
    try:
        save(trainer, run / "step_2", dtype="float32", step=2)
    except KeyboardInterrupt:
        found["after_failure"] = sorted(p.name for p in run.iterdir())
        found["latest_after_failure"] = open_source(str(work / "killed")).manifest["step"]
    os.rename = rename
    (run / "step_9.tmp").mkdir()
    saving.clear_unfinished(run)
    for step in (3, 4, 5):
        save(trainer, run / f"step_{step}", dtype="float32", step=step)
    found["after_recovery"] = sorted(p.name for p in run.iterdir())
    value = open_source(str(work / "killed"))
    found["value_head"] = [value.head, value.manifest["step"]]
    try:
        Model(value, ParallelConfig(), head="lm", dtype="float32", seed=1)
    except CheckpointError as error:
        found["value_to_lm"] = str(error)
    again = Model(value, ParallelConfig(), head="value", dtype="float32", seed=77)
    found["value_reloaded"] = all(torch.equal(a, trainer.parameters()[name]) for name, a in again.parameters().items())

    lm = open_source(str(work / "float32"))
    heads = [
        Model(s, ParallelConfig(), head="value", dtype="float32", seed=3).parameters() for s in (lm, open_source(hf))
    ]
    found["fresh_head_same"] = torch.equal(*(h["output_layer.weight"] for h in heads))
    body = Model(lm, ParallelConfig(), head="lm", dtype="float32", seed=1).parameters()
    found["body_kept"] = all(torch.equal(v, body[k]) for k, v in heads[0].items() if not k.startswith("output_layer"))

    old = as_format_2(lm.path, work / "format_2")
    old_body = Model(
        open_source(str(old), verify="hash"), ParallelConfig(), head="lm", dtype="float32", seed=1
    ).parameters()
    found["format 2"] = [read_manifest(old)["format"], all(torch.equal(v, body[k]) for k, v in old_body.items())]
    resumed = make(hf, ParallelConfig(), "float32")
    resumed.resume(old, 2, 2)
    found["after format 2"] = steps(resumed, prefix, 2)

    half = open_source(str(work / "bfloat16"))
    wide, narrow = (
        Model(half, ParallelConfig(), head="lm", dtype=d, seed=1).parameters() for d in ("float32", "bfloat16")
    )
    found["bfloat16_as_float32"] = all(
        v.dtype == torch.float32 and torch.equal(v, narrow[k].float()) for k, v in wide.items()
    )
    rounded = Model(lm, ParallelConfig(), head="lm", dtype="bfloat16", seed=1).parameters()
    found["float32_as_bfloat16"] = all(
        v.dtype == torch.bfloat16 and torch.equal(v, body[k].bfloat16()) for k, v in rounded.items()
    )
    newest = checkpoint.to_resume(work / "float32", total_steps=9)
    found["to_resume"] = newest and newest.manifest["step"]

    resumed = make(hf, ParallelConfig(), "float32")
    resumed.resume(work / "interleaved", 4, 4)
    found["after interleaved"] = steps(resumed, prefix, 2)

    for name, distributed, before in (("unstepped", True, 0), ("whole_optimizer", False, 2)):
        trainer = make(hf, ParallelConfig(), "float32", distributed=distributed)
        steps(trainer, prefix, before)
        save(trainer, work / name, dtype="float32", step=before, keep_last=None)
        again = make(hf, ParallelConfig(), "float32", distributed=distributed)
        again.resume(work / name, before, before)
        found[name] = [steps(trainer, prefix, 2), steps(again, prefix, 2)]
    return found


def main() -> None:
    hf, prefix, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    import torch.distributed as dist
    from disks import saves_on_a_full_disk
    from groups import leave_layout

    from mrlhf.config.options import ParallelConfig
    from mrlhf.parallel import state

    world = state.world_size()
    layouts = {
        "tp2": ParallelConfig(tensor_model_parallel_size=2),
        "pp2": ParallelConfig(pipeline_model_parallel_size=2),
        "dp2": ParallelConfig(),
        "tp2+sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "interleaved": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        "cp2": ParallelConfig(context_parallel_size=2, recompute="full"),
    }
    result: dict[str, Any] = {}
    for name, parallel in layouts.items() if world == 2 else [("1", ParallelConfig())]:
        state.initialize(parallel, seed=1)
        for dtype in ("float32", "bfloat16") if name in ("tp2", "pp2", "1") else ("float32",):
            saved = work / dtype / "checkpoints" / "step_2"
            trainer = make(hf, parallel, dtype)
            if name == "tp2":
                result["first"] = steps(trainer, prefix, 2)
                save(trainer, saved, dtype=dtype, step=2)
            else:
                trainer.resume(saved, 2, 2)
            result[f"{name} {dtype}"] = steps(trainer, prefix, 2)
            if name == "interleaved":
                save(trainer, work / name, dtype=dtype, step=4, keep_last=None)
                result["interleaved, unbroken"] = steps(trainer, prefix, 2)
        if world == 1:
            result |= alone(hf, prefix, work) | {"saves": failing_saves(hf, prefix, work)}
            if len(sys.argv) > 4:
                result["full disk"] = saves_on_a_full_disk(make(hf, ParallelConfig(), "float32"), Path(sys.argv[4]))
        leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
