"""Conversion rate against a plain load and save of the same bytes with safetensors, and peak memory at several sizes.

    python benchmarks/convert.py [--layers 4 16] [--repeats 5] [--output benchmarks/results/convert.md]

A Llama-shaped bf16 checkpoint of random values (16 layers: 1.7 GiB in two files); every arm runs in its own process,
one after the other within a repeat, reads files that are in the page cache, and ends with its output on the disk
(fsync). Rates leave out the interpreter's start and imports. Needs about 8 GiB of disk under runs/benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HIDDEN, FFN, VOCAB, HEADS, GROUPS = 2048, 5632, 32000, 16, 4
GIB = 2**30


def make(directory: Path, layers: int) -> int:
    """A HF directory; returns the bytes of its tensors."""
    import torch
    from safetensors.torch import save_file

    from mrlhf.models.families import hf_tensors, spec_from_hf

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = [(name, tensor.shape) for name, tensor in hf_tensors(spec_from_hf(config), head="lm").items()]
    total, weight_map = 0, {}
    for i, part in enumerate((shapes[::2], shapes[1::2])):
        tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in part}
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def peak_bytes() -> int:
    """Most memory this program has had; getrusage would count that of the program which started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def worker(arm: str, source: Path, target: Path) -> None:
    """Prints {seconds, cpu, peak_bytes, base_bytes}: the peak of the process, and what it had before it began."""
    os.environ["MRLHF_DEVICE"] = "cpu"
    from safetensors.torch import load_file, save_file

    from mrlhf.checkpoint.manifest import fsync
    from mrlhf.checkpoint.source import open_source
    from mrlhf.convert import hf
    from mrlhf.parallel import state

    hf.initialize_groups()
    open_source(str(source))  # the first reading of a config.json imports much of transformers
    for file in (f for f in source.rglob("*") if f.is_file()):  # every arm reads from the page cache
        with file.open("rb", buffering=0) as f:
            while f.read(1 << 24):
                continue
    cpu = time.process_time()
    base, start = peak_bytes(), time.perf_counter()
    if arm == "plain":
        target.mkdir()
        for file in sorted(source.glob("*.safetensors")):
            save_file(load_file(file), target / file.name, metadata={"format": "pt"})
            fsync(target / file.name)
    elif arm == "import":
        hf.hf_to_megatron(str(source), target)
    else:
        hf.megatron_to_hf(str(source), target)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {"seconds": seconds, "cpu": time.process_time() - cpu, "peak_bytes": peak_bytes(), "base_bytes": base}
        )
    )
    state.shutdown()


def run(arm: str, source: Path, target: Path) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--worker", arm, str(source), str(target)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(layers: int, repeats: int) -> tuple[int, dict[str, list[dict[str, float]]]]:
    work = ROOT / "runs/benchmark/convert"
    shutil.rmtree(work, ignore_errors=True)
    nbytes = make(work / "hf", layers)
    found: dict[str, list[dict[str, float]]] = {"plain": [], "import": [], "export": []}
    for _ in range(repeats):
        found["plain"].append(run("plain", work / "hf", work / "copy"))
        found["import"].append(run("import", work / "hf", work / "megatron"))
        found["export"].append(run("export", work / "megatron", work / "back"))
    for file in sorted((work / "hf").glob("*.safetensors")):
        assert file.read_bytes() == (work / "back" / file.name).read_bytes(), f"{file.name} did not come back"
    shutil.rmtree(work)
    return nbytes, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/convert.md")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), Path(args.worker[2]))
        return
    largest = VOCAB * HIDDEN * 2
    lines = [
        "| layers | GiB | arm | GiB/s, median | of plain | CPU seconds | memory over the start, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for layers in args.layers:
        nbytes, found = measure(layers, args.repeats)
        plain = [row["seconds"] for row in found["plain"]]
        for arm, rows in found.items():
            seconds = [row["seconds"] for row in rows]
            ratio = median(p / s for p, s in zip(plain, seconds, strict=True))
            memory = median(row["peak_bytes"] - row["base_bytes"] for row in rows)
            rate = nbytes / GIB / median(seconds)
            cpu = median(row["cpu"] for row in rows)
            lines.append(
                f"| {layers} | {nbytes / GIB:.2f} | {arm} | {rate:.2f} | {100 * ratio:.0f} % | {cpu:.1f} | "
                f"{memory / GIB:.2f} |"
            )
    text = "\n".join(
        [
            "# Conversion",
            "",
            f"`python benchmarks/convert.py --layers {' '.join(map(str, args.layers))} "
            f"--repeats {args.repeats}` on {os.cpu_count()} cores "
            f"({platform.machine()}), one process an arm, arms interleaved.",
            (
                "`plain` is safetensors' load and save of the same files; `import` is HF to Megatron, "
                "`export` Megatron to HF (checksums compared)."
            ),
            f"The largest tensor has {largest / GIB:.2f} GiB. "
            "`of plain` is the median of the ratios within a repeat. Load average at the "
            f"end: {os.getloadavg()[1]:.0f}.",
            "",
            *lines,
            "",
        ]
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
