"""Start-up and speed of a blend of 100 million samples from three sources.

    python benchmarks/blend.py [--samples 100000000] [--output benchmarks/results/blend.md]

The index files are real (2.6 GB for 100 million samples, in a temporary directory), the token files are sparse: opening
looks at their size only. Each line of the table is measured in a process of its own; RSS is anonymous memory (RssAnon)
above that of the imports, which leaves out pages of mapped files that the kernel may drop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARES, WEIGHTS, A_PACK, BATCH = (0.5, 0.3, 0.2), (0.6, 0.25, 0.15), 8, 1024


def write_source(prefix: Path, samples: int, seed: int) -> None:
    """Indices of `samples` samples of 64 to 1023 tokens, eight a pack,
    and token and mask files of the right size without content.
    """
    from mrlhf.data.indexed import FORMAT_VERSION, seal

    samples -= samples % A_PACK
    lengths = np.random.default_rng(seed).integers(64, 1024, samples, dtype=np.int32)
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    total = int(lengths.sum(dtype=np.int64))
    documents = np.arange(0, samples + 1, A_PACK, dtype=np.int64)
    files = {}
    for part, code, size in (("", 8, 2), ("_loss_mask", 1, 1)):
        with open(f"{prefix}{part}.idx", "wb") as file:
            file.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([code]))
            file.write(np.array([samples, len(documents)], "<u8").tobytes())
            for array in (lengths, offsets * size, documents):
                array.tofile(file)
        with open(f"{prefix}{part}.bin", "wb") as file:
            file.truncate(total * size)
        for kind in (".bin", ".idx"):
            files[part + kind] = {"bytes": os.path.getsize(f"{prefix}{part}{kind}"), "sha256": ""}
    meta = {
        "format": FORMAT_VERSION,
        "task": "sft",
        "seq_length": 8192,
        "num_samples": samples,
        "num_packs": len(documents) - 1,
        "tokenizer": "none",
        "tokenizer_fingerprint": "0" * 64,
        "vocab_size": 65000,
        "files": files,
    }
    Path(f"{prefix}.json").write_bytes(seal(meta))


def anonymous_mib() -> float:
    """Memory of this process that is not a page of a mapped file, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["RssAnon"].split()[0]) / 1024


def measure(name: str, folder: Path, samples: int) -> dict[str, float]:
    from mrlhf.data.blend import Blend, mismatches, rows_of
    from mrlhf.data.indexed import PackedDataset
    from mrlhf.data.order import Mix, Order

    rows = [int(samples * s) + i for i, s in enumerate(SHARES)]
    before, start, started = anonymous_mib(), time.perf_counter(), time.process_time()

    def order() -> Order:
        mix = Mix.from_weights(rows, WEIGHTS, [None] * 3)
        return Order(mix, global_batch_size=BATCH, num_epochs=1, max_steps=None, seed=1, shuffle=True)

    if name == "open":
        sources = [PackedDataset.open(folder / f"source{i}") for i in range(3)]
        assert not mismatches(sources, key="data.train")
        blend = Blend(sources)
        assert rows_of(blend, packing=False) > 0.99 * samples
        done, used = time.perf_counter(), time.process_time() - started
        kept = blend
    elif name == "start":
        kept = order()
        kept.rows(1)
        done, used = time.perf_counter(), time.process_time() - started
    elif name == "resume":
        kept, step = order(), samples // 2 // BATCH
        position = step * BATCH
        counts = [int(position * w) for w in WEIGHTS]
        counts[0] += position - sum(counts)
        kept.resume_after_step(step, counts)
        kept.rows(step + 1)
        done, used = time.perf_counter(), time.process_time() - started
    elif name == "rows":
        kept = order()
        for step in range(1, 201):
            kept.rows(step)
        done, used = time.perf_counter(), time.process_time() - started
        return {"rows_s": 200 * BATCH / used, "mib": anonymous_mib() - before}
    elif name == "replay":
        kept = Order(
            Mix.from_weights(rows, [None] * 3, [None] * 3),
            global_batch_size=BATCH,
            num_epochs=1,
            max_steps=None,
            seed=1,
            shuffle=True,
        )
        kept.consumed(1000)
        done, used = time.perf_counter(), time.process_time() - started
        return {"rows_s": 1000 * BATCH / used, "mib": anonymous_mib() - before}
    else:  # what an index of the whole costs: a permutation of each source
        kept = [np.random.default_rng(i).permutation(n) for i, n in enumerate(rows)]
        done, used = time.perf_counter(), time.process_time() - started
    return {"seconds": done - start, "cpu": used, "mib": anonymous_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/blend.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.samples)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, share in enumerate(SHARES):
            write_source(Path(folder) / f"source{i}", int(args.samples * share), i)
        for _ in range(3):
            for name in ("open", "start", "resume", "rows", "replay", "permutations"):
                command = [sys.executable, __file__, "--samples", str(args.samples), "--measure", name, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault(name, []).append(json.loads(done.stdout))

    def median(name: str, key: str) -> float:
        return float(np.median([f[key] for f in found[name]]))

    lines = [
        "# Blends",
        "",
        f"`python benchmarks/blend.py --samples {args.samples}` on {os.cpu_count()} shared cores "
        f"({platform.machine()}), medians of 3, each in "
        f"its own process. Three sources, weights {WEIGHTS}, {BATCH} rows a step. Indices are real, "
        "token files sparse (nothing reads them here).",
        "",
        "| what | seconds (CPU seconds) | memory (anonymous) |",
        "|---|---|---|",
        *(
            f"| {text} | {median(name, 'seconds'):.3g} ({median(name, 'cpu'):.3g}) | {median(name, 'mib'):.0f} MiB |"
            for name, text in (
                ("open", f"open and check the indices of {args.samples:,} samples"),
                ("start", "the order, from nothing to the rows of step 1"),
                ("resume", "the order, from a checkpoint in the middle to the rows of the next step"),
                ("permutations", "(for comparison) `numpy` permutations of the three sources"),
            )
        ),
        "",
        "| rate | rows per CPU second |",
        "|---|---|",
        f"| rows of a step: source, epoch, permuted row | {median('rows', 'rows_s'):,.0f} |",
        f"| counting anew where a checkpoint has no counts | {median('replay', 'rows_s'):,.0f} |",
        "",
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
