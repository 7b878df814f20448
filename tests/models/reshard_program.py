"""Under torchrun on 8 ranks: weights from many trainer layouts into many vLLM layouts, against gathering every tensor;
writes JSON.

usage: reshard_program.py OUTPUT.json
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# trainer: tp, pp, pieces (virtual), first, last, ep, cp; then vLLM's tp.
# `real`: the trainer's tensors are those of a Megatron model
CASES: dict[str, dict[str, Any]] = {
    f"{'real ' if case.get('real') else ''}{'moe ' if case.get('moe') else ''}{'tied ' if case.get('tied') else ''}"
    f"tp{case.get('tp', 1)} pp{case.get('pp', 1)} vpp{case.get('pieces', 1)} "
    f"ends{case.get('first', '')}/{case.get('last', '')}"
    f" ep{case.get('ep', 1)} cp{case.get('cp', 1)} -> tp{case['to']}": case
    for case in [
        *({"tp": tp, "pp": pp, "to": to} for tp, pp in ((1, 1), (2, 1), (4, 2), (2, 4), (1, 8)) for to in (1, 2, 4)),
        {"tp": 4, "pp": 2, "to": 8},
        {"tp": 2, "pp": 2, "pieces": 2, "to": 1, "real": True},
        {"tp": 2, "pp": 2, "pieces": 2, "to": 4, "tied": True, "real": True},
        {"tp": 1, "pp": 4, "pieces": 2, "to": 2},
        {"tp": 1, "pp": 2, "first": 2, "to": 2, "real": True},
        {"tp": 2, "pp": 4, "first": 1, "last": 3, "to": 2, "tied": True, "real": True},
        {"tp": 1, "pp": 2, "pieces": 2, "last": 2, "to": 2},
        {"tp": 2, "pp": 2, "cp": 2, "to": 2},
        {"moe": True, "tp": 1, "pp": 1, "ep": 8, "to": 2},
        {"moe": True, "tp": 2, "pp": 2, "ep": 4, "to": 2, "real": True},
        {"moe": True, "tp": 2, "pp": 2, "pieces": 2, "ep": 2, "to": 4},
        {"moe": True, "tp": 4, "pp": 2, "to": 2},
        {"moe": True, "tp": 2, "pp": 1, "ep": 4, "to": 8},
    ]
}
BUCKET = 6144

Shard = Mapping[str, Sequence[Any]]


def shard_tensors(shard: Shard, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a shard, filled straight from the HF tensors;
    -1 where no HF row stands (vocabulary padding).
    """
    found = {}
    for name, blocks in shard.items():
        sample = values[blocks[0].hf] if blocks else torch.empty(0)
        shape = list(sample.shape)
        if blocks:
            shape[blocks[0].dim] = max(b.offset + b.length for b in blocks)
        found[name] = torch.full(shape, -1.0, dtype=sample.dtype)
        for b in blocks:
            found[name].narrow(b.dim, b.offset, b.length).copy_(values[b.hf].narrow(b.dim, b.start, b.length))
    return found


def minimum(shapes: Mapping[str, tuple[int, ...]], held: Shard, wanted: Shard) -> int:
    """Numbers that a rank needs and does not hold, counted row by row."""

    def rows(shard: Shard) -> dict[tuple[str, int], set[int]]:
        found: dict[tuple[str, int], set[int]] = defaultdict(set)
        for blocks in shard.values():
            for b in blocks:
                found[b.hf, b.dim] |= set(range(b.start, b.start + b.length))
        return found

    mine = rows(held)
    return sum(
        len(need - mine[hf, dim]) * math.prod(shapes[hf]) // shapes[hf][dim] for (hf, dim), need in rows(wanted).items()
    )


def gathered(
    shapes: Mapping[str, tuple[int, ...]], shard: Shard, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every whole HF tensor on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        parts,
        [(b, tensors[n].narrow(b.dim, b.offset, b.length).clone()) for n, blocks in shard.items() for b in blocks],
    )
    whole = {hf: torch.full(shape, math.nan) for hf, shape in shapes.items()}
    for b, value in (entry for part in parts for entry in part):
        whole[b.hf].narrow(b.dim, b.start, b.length).copy_(value)
    return whole


def main() -> None:
    from mrlhf.config.options import ParallelConfig
    from mrlhf.models.families import hf_tensors, vllm_map
    from mrlhf.models.families.spec import Experts, Layer, ModelSpec, Rope
    from mrlhf.models.reshard_plan import make_weight_update, trainer_shard
    from mrlhf.parallel import state
    from mrlhf.training.trainer import Model

    # isort: split
    from groups import leave_layout

    dist.init_process_group("gloo")
    rank, world, results = dist.get_rank(), dist.get_world_size(), {}
    received = [0]
    start_messages = dist.batch_isend_irecv

    def counted(operations: list[Any]) -> Any:
        received[0] += sum(o.tensor.nbytes for o in operations if o.op is dist.irecv)
        return start_messages(operations)

    dist.batch_isend_irecv = counted
    for name, case in CASES.items():
        spec = ModelSpec(
            "qwen3_moe" if case.get("moe") else "qwen2", 8, 16, 32, 8, 8, 2, 150, 64, 1e-6,
            tied=case.get("tied", False),
            layers=tuple(Layer(moe=bool(case.get("moe")) and i % 3 > 0) for i in range(8)),
            qkv_bias=not case.get("moe"), qk_norm="head" if case.get("moe") else "none",
            experts=Experts(8, 2, 16) if case.get("moe") else None, ropes=(Rope(theta=1e4),),
        )  # fmt: skip
        parallel = ParallelConfig(
            case.get("tp", 1),
            case.get("pp", 1),
            case.get("pieces"),
            case.get("first"),
            case.get("last"),
            case.get("cp", 1),
            case.get("ep", 1),
        )
        layout = state.Layout.from_config(parallel, world)
        shapes = {name: tensor.shape for name, tensor in hf_tensors(spec, head="lm").items()}
        shard, wanted = trainer_shard(spec, layout, rank), vllm_map(spec, tp=case["to"], rank=rank % case["to"])
        generator = torch.Generator().manual_seed(7)
        held = shard_tensors(shard, {hf: torch.randn(shape, generator=generator) for hf, shape in shapes.items()})
        misplaced: list[str] = []
        if case.get("real"):
            state.initialize(parallel, seed=1)
            source = type("Source", (), {"spec": spec, "path": None})()
            held = Model(source, parallel, head="lm", dtype="float32", seed=3, random_init=True).parameters()
            misplaced = sorted(set(held) ^ set(shard))
        target = {
            n: torch.full_like(x, -1.0)
            for n, x in shard_tensors(wanted, {hf: torch.empty(shape) for hf, shape in shapes.items()}).items()
        }
        reshard = make_weight_update(
            spec, layout, rollout_tp=case["to"], rank=rank, dtype=torch.float32, bucket_bytes=BUCKET, node=4
        ).in_place
        reference = {} if misplaced else shard_tensors(wanted, gathered(shapes, shard, held))
        wrong = []
        for _ in range(2):  # the second time into what the first has written, from changed weights
            received[0] = 0
            if not misplaced:
                reshard.exchange(held, target)
                wrong += [f"{n} on rank {rank}" for n, x in reference.items() if not torch.equal(x, target[n])]
            for tensor in held.values():
                tensor.mul_(2.0)
            reference = {n: torch.where(x == -1.0, x, 2.0 * x) for n, x in reference.items()}
        least = 4 * minimum(shapes, shard, wanted)
        per_rank: list[Any] = [None] * world
        dist.all_gather_object(
            per_rank,
            (wrong, misplaced, received[0], reshard.received, least, reshard.packing_bytes, len(reshard.buckets)),
        )
        columns = list(zip(*per_rank, strict=True))
        results[name] = {
            "wrong": sum(columns[0], []),
            "misplaced": sum(columns[1], []),
            "received": columns[2],
            "planned": columns[3],
            "minimum": columns[4],
            "packing": max(columns[5]),
            "bucket": BUCKET,
            "buckets": max(columns[6]),
            "min_buckets": max(columns[3]) // BUCKET,
        }
        if case.get("real"):
            leave_layout()
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
