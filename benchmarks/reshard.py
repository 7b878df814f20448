"""Trainer weights into vLLM's shards: the plan's exchange against gathering every tensor and loading it,
in the same run.

    python benchmarks/reshard.py [--tp 4] [--pp 2] [--rollout-tp 2] [--ranks 8] [--bucket-mib 32] [--repeats 5]
                                 [--output benchmarks/results/reshard.md]

Llama-shaped bf16 weights of random values as Megatron cuts them, on gloo ranks of this machine, and tensors of vLLM's
shapes. The other arm is what other hybrid engines do, one tensor at a time: broadcast over the pipeline stages,
all-gather over the tensor-parallel ranks, then cut this rank's part out of the whole tensor, as vLLM's loaders do. Both
arms in turns, after one round that does not count; a time is the slowest rank's, extra memory the growth of the fullest
rank's peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIB = 2**20


def resident(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def worker(args: argparse.Namespace) -> None:
    os.environ["MRLHF_DEVICE"] = "cpu"
    import torch
    import torch.distributed as dist

    import mrlhf.parallel  # noqa: F401  (adapts megatron.core)
    from mrlhf.models.families import hf_tensors, spec_from_hf, vllm_map
    from mrlhf.models.reshard_plan import make_weight_update, trainer_shard
    from mrlhf.parallel.state import Layout

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = spec_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 11 // 4,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden // 64,
            "num_key_value_heads": args.hidden // 128,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
        }
    )
    layout = Layout(world, args.tp, args.pp)
    shapes = {name: tensor.shape for name, tensor in hf_tensors(spec, head="lm").items()}
    tp, dp, pp = layout.coordinates(rank)
    shards = [trainer_shard(spec, layout, r) for r in range(world)]
    wanted = vllm_map(spec, tp=args.rollout_tp, rank=rank % args.rollout_tp)

    def empty(shard: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        found = {}
        for name, blocks in shard.items():
            shape = list(shapes[blocks[0].hf])
            shape[blocks[0].dim] = max(b.offset + b.length for b in blocks)
            found[name] = torch.zeros(shape, dtype=torch.bfloat16)
        return found

    source, target, generator = empty(shards[rank]), empty(wanted), torch.Generator()
    for name in sorted(source):
        generator.manual_seed(hash((name, tp)) % 2**31 if "norm" not in name else 1)  # norms are the same on every rank
        source[name].copy_(torch.randn(source[name].shape, generator=generator))
    pipelines = [
        dist.new_group([r for r in range(world) if layout.coordinates(r)[:2] == (t, d)])
        for d in range(layout.dp)
        for t in range(args.tp)
    ]
    tensor_groups = [
        dist.new_group([r for r in range(world) if layout.coordinates(r)[1:] == (d, p)])
        for p in range(args.pp)
        for d in range(layout.dp)
    ]
    pipeline, tensors = pipelines[dp * args.tp + tp], tensor_groups[pp * layout.dp + dp]
    places: dict[str, list[tuple[str, Any]]] = {}
    for name, blocks in wanted.items():
        for block in blocks:
            places.setdefault(block.hf, []).append((name, block))
    stage_ranks = [next(r for r in range(world) if layout.coordinates(r) == (tp, dp, p)) for p in range(args.pp)]
    of_tp = [
        [next(r for r in range(world) if layout.coordinates(r) == (t, dp, p)) for t in range(args.tp)]
        for p in range(args.pp)
    ]

    def gather() -> None:
        for p in range(args.pp):
            for name, blocks in shards[stage_ranks[p]].items():
                shape = list(shapes[blocks[0].hf])
                shape[blocks[0].dim] = max(b.offset + b.length for b in blocks)
                mine = source[name] if p == pp else torch.empty(shape, dtype=torch.bfloat16)
                if args.pp > 1:
                    dist.broadcast(mine, src=stage_ranks[p], group=pipeline)
                parts = [torch.empty_like(mine) for _ in range(args.tp)] if args.tp > 1 else [mine]
                if args.tp > 1:
                    dist.all_gather(parts, mine, group=tensors)
                whole = {b.hf: torch.empty(shapes[b.hf], dtype=torch.bfloat16) for b in blocks}
                for t, part in enumerate(parts):
                    for b in shards[of_tp[p][t]][name]:
                        whole[b.hf].narrow(b.dim, b.start, b.length).copy_(part.narrow(b.dim, b.offset, b.length))
                for hf, value in whole.items():
                    for target_name, b in places[hf]:
                        target[target_name].narrow(b.dim, b.offset, b.length).copy_(
                            value.narrow(b.dim, b.start, b.length)
                        )

    start = time.perf_counter()
    plan = make_weight_update(
        spec, layout, rollout_tp=args.rollout_tp, rank=rank, dtype=torch.bfloat16, bucket_bytes=args.bucket_mib * MIB
    ).in_place
    plan_s = time.perf_counter() - start
    arms = {"gather and load": gather, "plan": lambda: plan.exchange(source, target)}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
    reference: dict[str, torch.Tensor] = {}
    for _ in range(args.repeats + 1):
        for name, arm in arms.items():
            for tensor in target.values():
                tensor.zero_()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
            before, cpu = resident("VmRSS"), time.process_time()
            dist.barrier()
            start = time.perf_counter()
            arm()
            cost = torch.tensor(
                [time.perf_counter() - start, resident("VmHWM") - before, time.process_time() - cpu],
                dtype=torch.float64,
            )
            dist.all_reduce(cost[:2], op=dist.ReduceOp.MAX)
            total_cpu = cost[2:].clone()
            dist.all_reduce(total_cpu)
            found[name].append((float(cost[0]), float(cost[1]), float(total_cpu)))
            reference = reference or {n: x.clone() for n, x in target.items()}
            assert all(torch.equal(x, reference[n]) for n, x in target.items()), "the arms differ"
    sizes = torch.tensor([plan.sent, plan.received, plan.copied, plan.packing_bytes, plan_s], dtype=torch.float64)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    if rank == 0:
        weights = 2 * sum(torch.Size(s).numel() for s in shapes.values())
        print(
            "RESULT "
            + json.dumps(
                {"arms": {n: rows[1:] for n, rows in found.items()}, "sizes": sizes.tolist(), "weights": weights}
            )
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("tp", 4),
        ("pp", 2),
        ("rollout-tp", 2),
        ("ranks", 8),
        ("bucket-mib", 32),
        ("repeats", 5),
        ("hidden", 1024),
        ("layers", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks),
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__,
                "--worker", *(a for a in sys.argv[1:])]  # fmt: skip
    done = subprocess.run(launcher, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    arms, (sent, received, copied, packing, plan_s) = result["arms"], result["sizes"]
    rows = {name: [median(column) for column in zip(*runs, strict=True)] for name, runs in arms.items()}
    ratios = sorted(a[0] / b[0] for a, b in zip(arms["gather and load"], arms["plan"], strict=True))
    command = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name not in ("output", "worker")
    )
    lines = [
        "# Reshard against gather and load",
        "",
        f"`python benchmarks/reshard.py {command}`; "
        f"trainer TP {args.tp} x PP {args.pp} -> vLLM TP {args.rollout_tp}, {args.ranks} gloo ranks, "
        f"{os.cpu_count()} cores, {platform.machine()}; "
        f"{result['weights'] / MIB:,.0f} MiB of bf16 weights; medians of {args.repeats} rounds in turns.",
        "",
        "| | seconds | extra memory of the fullest rank, MiB | CPU s of all ranks |",
        "|---|---|---|---|",
        *(f"| {name} | {row[0]:.2f} | {row[1] / MIB:.1f} | {row[2]:.2f} |" for name, row in rows.items()),
        (
            f"| gather / plan | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | | "
            f"{rows['gather and load'][2] / rows['plan'][2]:.2f} |"
        ),
        "",
        f"The plan took {plan_s:.2f} s to make. At most {sent / MIB:.1f} MiB sent, "
        f"{received / MIB:.1f} MiB received and {copied / MIB:.1f} MiB copied by a "
        f"rank; {packing / MIB:.1f} MiB for packing, of a bucket of {args.bucket_mib} MiB. "
        "Results are equal bit for bit.",
    ]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
