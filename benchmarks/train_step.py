"""An optimizer step of mrlhf against a hand-written transformers + AdamW loop of the same model, in fp32 on CPU.

    python benchmarks/train_step.py [--sizes 4x256 8x512] [--vocab 8192] [--rows 4] [--tokens 512] [--repeats 15]
                                    [--profile] [--output FILE]

Dense batches (rows of equal length, every token trained). Both loops run in one process on two threads and take turns,
step by step; then two tensor-parallel ranks with one thread each run by themselves (they would disturb the others),
before and after. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
LR, CLIP = 1e-4, 1.0
# what every process of the benchmark must have before torch is imported
QUIET = {
    "TORCH_COMPILE_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONPATH": str(ROOT),
}


def make_model(folder: Path, layers: int, hidden: int, vocab: int, tokens: int) -> None:
    """A random Llama as an HF directory. No tokenizer is needed: the batches are random ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3) // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def batches(vocab: int, rows: int, tokens: int) -> Any:
    """[16, rows, tokens] random ids, the same everywhere."""
    import torch

    return torch.randint(0, vocab, (16, rows, tokens), generator=torch.Generator().manual_seed(1))


def plain_loop(folder: Path) -> Callable[[Any], float]:
    """What a person writes: forward with labels, backward, clip, AdamW, zero_grad.
    Returns the step, which returns the loss.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def step(ids_BT: Any) -> float:
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def our_loop(folder: Path, tp: int) -> Callable[[Any], float]:
    """mrlhf's SFT step."""
    import torch

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig, ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.parallel import state
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import Trainer

    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    state.initialize(parallel, seed=1)
    optim = OptimConfig(lr=LR, lr_decay_style="constant", clip_grad=CLIP, weight_decay=0.0)
    trainer = Trainer(open_source(str(folder)), parallel, optim, head="lm", dtype="float32", seed=1, total_steps=10**6)
    loss = language_model_loss(trainer, aggregation="token")
    torch.set_num_threads(THREADS // tp)

    def step(ids_BT: Any) -> float:
        rows = [Sample(ids.numpy(), (ids * 0 + 1).numpy(), i) for i, ids in enumerate(ids_BT)]
        for row in rows:
            row.mask[0] = 0
        return trainer.step([collate(rows, packing=False, pad_multiple=1)], loss)["loss"]

    return step


def measure(folder: Path, way: str, args: argparse.Namespace) -> None:
    """In a process of its own: prints JSON, {loop: [seconds of each step]} and the losses."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(THREADS)
    tp = 2 if way == "tp2" else 1
    loops = {f"mrlhf, TP{tp}" if tp > 1 else "mrlhf": our_loop(folder, tp)}
    if tp == 1:
        loops = {"transformers": plain_loop(folder), **loops}
    ids = batches(args.vocab, args.rows, args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {name: [] for name in loops}
    for i in range(args.repeats + 3):
        for name, step in loops.items():
            start = time.perf_counter()
            losses[name].append(step(ids[i % len(ids)]))
            if i >= 3:
                seconds[name].append(time.perf_counter() - start)
    profiles = {}
    if args.profile and tp == 1:
        for name, step in loops.items():
            with torch.profiler.profile() as profile:
                for i in range(3):
                    step(ids[i])
            profiles[name] = profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=45
            )
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"seconds": seconds, "losses": losses, "profiles": profiles}))
    dist.destroy_process_group()


def run(folder: Path, way: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable]
    if way == "tp2":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        __file__,
        "--measure",
        way,
        str(folder),
        "--vocab",
        str(args.vocab),
        "--rows",
        str(args.rows),
        "--tokens",
        str(args.tokens),
    ]
    command += ["--repeats", str(args.repeats), *(["--profile"] if args.profile else [])]
    threads = {"OMP_NUM_THREADS": str(THREADS if way == "both" else 1)}
    done = subprocess.run(command, env={**os.environ, **QUIET, **threads}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    return json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT ")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4x256", "8x512"], help="layers x hidden size")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="print where both loops' time goes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(Path(args.measure[1]), args.measure[0], args)
    lines = [
        "# One optimizer step",
        "",
        f"`python benchmarks/train_step.py --sizes {' '.join(args.sizes)} --vocab {args.vocab} --rows {args.rows} "
        f"--tokens {args.tokens}"
        f" --repeats {args.repeats}` on {len(os.sched_getaffinity(0))} cores ({platform.machine()}), fp32.",
        "",
        f"Llama, {args.rows} rows of {args.tokens} tokens a step, vocabulary {args.vocab}; "
        f"medians of {args.repeats} steps in turns (TP2: of twice"
        " as many, before and after).",
        "",
        "| layers x hidden | loop | ms a step | of transformers |",
        "|---|---|---|---|",
    ]
    for size in args.sizes:
        layers, hidden = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), layers, hidden, args.vocab, args.tokens)
            first, both, last = (run(Path(folder), way, args) for way in ("tp2", "both", "tp2"))
        seconds = {**both["seconds"], "mrlhf, TP2": first["seconds"]["mrlhf, TP2"] + last["seconds"]["mrlhf, TP2"]}
        losses = both["losses"]
        apart = max(abs(a - b) / a for a, b in zip(losses["transformers"], losses["mrlhf"], strict=True))
        base = statistics.median(seconds["transformers"])
        for name, found in seconds.items():
            middle = statistics.median(found)
            threads = f"{THREADS} threads" if "TP2" not in name else "2 ranks, 1 thread each"
            lines.append(f"| {size} | {name}, {threads} | {1000 * middle:.0f} | {middle / base:.2f} |")
        lines.append(f"| | largest relative difference of the losses | | {apart:.0e} |")
        for name, table in both["profiles"].items():
            print(f"{size}, {name}\n{table}")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
