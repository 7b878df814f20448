"""Saves with one kind of optimizer, goes on with another; prints JSON. Under torchrun with 2 ranks.

usage: optimizer_program.py DENSE_HF MOE_HF MIXED_HF DATA_PREFIX WORK_DIR

Each writer saves after two steps and takes two more. Each reader takes these two steps from each writer's checkpoint.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

# name: parallel sizes, use_distributed_optimizer
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "dp2": ({}, True),
    "dp2 before": ({}, True),  # as earlier versions wrote it
    "dp2 whole": ({}, False),
    "tp2 whole": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, False),
    "pp2": ({"pipeline_model_parallel_size": 2}, True),
    "pp2 whole": ({"pipeline_model_parallel_size": 2}, False),
    "interleaved": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, True),
    "ep2": ({"expert_model_parallel_size": 2}, True),
    "ep2 before": ({"expert_model_parallel_size": 2}, True),  # likewise
    "ep2 whole": ({"expert_model_parallel_size": 2}, False),
}
# model, dtype, writers, readers
CASES = (
    ("dense", "float32", ["dp2", "dp2 whole"], ["dp2", "dp2 whole"]),
    ("dense", "bfloat16", ["dp2", "dp2 whole", "dp2 before"], ["dp2", "dp2 whole", "interleaved"]),
    # one stage is dense, the other has experts: ranks must agree on the number of loads
    ("mixed", "float32", ["pp2"], ["pp2 whole", "dp2"]),
    ("moe", "float32", ["dp2", "ep2 before", "ep2 whole"], ["dp2", "ep2", "tp2 whole"]),
)


def trainer_of(hf: str, kind: str, dtype: str, **options: Any) -> Any:
    from checkpoint_program import make

    from mrlhf.config.options import ParallelConfig
    from mrlhf.parallel import state

    sizes, distributed = KINDS[kind]
    parallel = ParallelConfig(**sizes)
    state.initialize(parallel, seed=1)
    return make(hf, parallel, dtype, distributed=distributed, **options)


def write(trainer: Any, name: str, target: Path, dtype: str) -> None:
    from checkpoint_program import save

    save(trainer, target, dtype=dtype, step=2, keep_last=None)
    if name.endswith("before"):
        as_format_3(trainer, target)


def as_format_3(trainer: Any, checkpoint: Path) -> None:
    """Puts what Megatron itself saves under the names of format 3 in the place of a checkpoint's tensors: all of a
    parameter's state in one chunk, with the prefix of chained optimizers.
    """
    import shutil

    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from mrlhf.checkpoint import manifest
    from mrlhf.models import gpt

    for layer in (layer for model in trainer.modules for layer in model.decoder.layers):
        layer.submodules_config.sharded_state_dict_keys_map = {}
    state = gpt.sharded_state(trainer.modules)
    weights = state["model"] if len(state) == 1 else dict(state)
    metadata = {k: v for k, v in gpt.sharding_metadata(trainer.modules[0]).items() if k != "chained_optim_avoid_prefix"}
    state["optimizer"] = trainer.optimizer.sharded_state_dict(weights, metadata=metadata)
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoint / "dist")
        (checkpoint / "dist").mkdir()
    dist.barrier()
    dist_checkpointing.save(state, str(checkpoint / "dist"))
    dist.barrier()
    if dist.get_rank() == 0:
        content = {k: v for k, v in json.loads((checkpoint / "mrlhf.json").read_text()).items() if k != "seal"}
        current, manifest.FORMAT = manifest.FORMAT, 3
        manifest.write_manifest(checkpoint, content)
        manifest.FORMAT = current
    dist.barrier()


def in_float32(checkpoint: Path, reader: str, hf: str) -> dict[str, Any]:
    """A run that goes on in float32 with other options: its weights are the masters, its options are its own."""
    import torch

    trainer = trainer_of(hf, reader, "float32", lr=5e-4, beta2=0.9)
    trainer.resume(checkpoint, 2, 2)
    groups = [[g["betas"][1], g["max_lr"], g["step"]] for g in trainer.optimizer.param_groups]
    (model,) = trainer.modules
    weights = {name: p.detach().clone() for name, p in trainer.parameters().items()}
    rounded = trainer_of(hf, "dp2", "bfloat16")
    rounded.resume(checkpoint, 2, 2)
    pairs = [(weights[name], p.detach().float()) for name, p in rounded.parameters().items()]
    return {
        "groups": groups,
        "more than bfloat16": any(not torch.equal(w, w.bfloat16().float()) for w, _ in pairs),
        "rounds to it": all(torch.equal(w.bfloat16().float(), p) for w, p in pairs),
        "sum": [float(sum(w.double().sum() for w, _ in pairs))],
    }


def main() -> None:
    dense, moe, mixed, prefix, work = *sys.argv[1:5], Path(sys.argv[5])
    import torch.distributed as dist
    from checkpoint_program import steps
    from groups import leave_layout

    from mrlhf.checkpoint.safe_pickle import read_metadata

    result: dict[str, Any] = {}
    models = {"dense": dense, "moe": moe, "mixed": mixed}
    for model, dtype, writers, readers in CASES:
        here = result[f"{model} {dtype}"] = {}
        for writer in writers:
            trainer = trainer_of(models[model], writer, dtype)
            steps(trainer, prefix, 2)
            target = work / model / dtype / writer
            write(trainer, writer, target, dtype)
            names = read_metadata(target / "dist").state_dict_metadata
            here[writer] = {
                "unbroken": steps(trainer, prefix, 2),
                "former names": [n for n in names if re.search(r"^chained_|\.linear_kv_up\.", n)]
                or [n for n in names if ".input_layernorm." in n and model != "mixed"],
            }
            leave_layout()
            for reader in readers:
                trainer = trainer_of(models[model], reader, dtype)
                trainer.resume(target, 2, 2)
                here[writer][reader] = steps(trainer, prefix, 2)
                leave_layout()
    for writer in ("dp2", "dp2 whole"):
        for reader in ("dp2", "dp2 whole"):
            checkpoint = work / "dense/bfloat16" / writer
            result[f"{writer} as float32 {reader}"] = in_float32(checkpoint, reader, dense)
            leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
