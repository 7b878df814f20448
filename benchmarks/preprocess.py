"""tools/preprocess_data.py: throughput against bare tokenizers and Megatron-LM's way, packing, memory.

    python benchmarks/preprocess.py [--only throughput packing memory] [--mb 200] [--gigabytes 5] [--repeats 3]

Text is what this environment's own packages hold (source code, documentation), cut into documents of a few kilobytes;
the tokenizer is a 32k byte-level BPE with Qwen2's split, trained on a part of it. Arms of a repeat run one after
another, and medians over the repeats are compared, so that a noisy machine slows all of them. Commands are timed as a
whole, on the text and on its first row alone: the difference is what the text costs, and is what the rates are made of.
About 15 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
CORES = len(os.sched_getaffinity(0))
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLE_MB = 20  # of the text, for the bare tokenizer


def documents() -> Iterator[str]:
    """Real text, the same on every call."""
    rng = random.Random(0)
    files = sorted(
        f
        for f in Path(sysconfig.get_paths()["purelib"]).rglob("*")
        if f.suffix in (".py", ".md", ".rst", ".txt", ".pyi") and f.is_file()
    )
    rng.shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore").replace("\x00", "")
        at = 0
        while at < len(text):
            size = int(rng.lognormvariate(7.6, 0.8)) + 40
            if text[at : at + size].strip():
                yield text[at : at + size]
            at += size


def write_corpus(folder: Path, megabytes: float) -> tuple[Path, Path]:
    """(plain.jsonl, chat.jsonl), each with about so many megabytes of text."""
    plain, chat = folder / "plain.jsonl", folder / "chat.jsonl"
    size = 0
    turns: list[str] = []
    with open(plain, "w", encoding="utf-8") as p, open(chat, "w", encoding="utf-8") as c:
        while size < megabytes * 1e6:
            for text in documents():
                p.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                turns.append(text.strip() or "x")
                if len(turns) == 4:
                    roles = ("user", "assistant") * 2
                    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
                    c.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                    turns = []
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    break
    return plain, chat


def make_tokenizer(directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=32768,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    size, texts = 0, []
    for text in documents():
        texts.append(text)
        size += len(text)
        if size > 12e6:
            break
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


# ---- arms ----------------------------------------------------------------------------------------


def bare(tokenizer_dir: Path, path: Path, kind: str) -> tuple[float, float]:
    """(seconds, MB) of one core's encode_batch_fast on the first texts (chats rendered before the clock starts)."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    render = AutoTokenizer.from_pretrained(tokenizer_dir).apply_chat_template
    texts, size = [], 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            text = row["text"] if kind == "plain" else render(row["messages"], tokenize=False)
            texts.append(text)
            size += len(text.encode())
            if size > SAMPLE_MB * 1e6:
                break
    start = time.perf_counter()
    for at in range(0, len(texts), 256):
        tokenizer.encode_batch_fast(texts[at : at + 256], add_special_tokens=False)
    return time.perf_counter() - start, size / 1e6


def tool(tokenizer_dir: Path, path: Path, kind: str, backend: str, out: Path) -> float:
    """Seconds of the whole command."""
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--task",
        "pretrain" if kind == "plain" else "sft",
        "--input",
        str(path),
    ]
    command += [
        "--tokenizer",
        str(tokenizer_dir),
        "--output-prefix",
        str(out),
        "--seq-length",
        "8192",
        "--workers",
        str(CORES),
        "--overwrite",
    ]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--tokenizer-backend", backend],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


_tokenizer: Any


def _start(directory: str) -> None:
    global _tokenizer
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(directory)


def _encode(line: str) -> list[int]:
    return [*_tokenizer(json.loads(line)["text"])["input_ids"], _tokenizer.eos_token_id]


def megatron_way(tokenizer_dir: Path, path: Path, out: Path) -> None:
    """What Megatron-LM's preprocess_data.py does: a pool encodes line by line,
    one process writes what comes back as lists.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
    with (
        open(path, encoding="utf-8") as file,
        multiprocessing.Pool(CORES, initializer=_start, initargs=(str(tokenizer_dir),)) as pool,
    ):
        import torch

        for ids in pool.imap(_encode, file, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{out}.idx")


def throughput(folder: Path, megabytes: float, repeats: int) -> list[str]:
    plain, chat = write_corpus(folder, megabytes)
    tokenizer_dir = folder / "tokenizer"
    make_tokenizer(tokenizer_dir)
    size = {kind: sum(len(t.encode()) for t in _texts(path)) / 1e6 for kind, path in (("plain", plain), ("chat", chat))}
    docs = {kind: sum(1 for _ in _texts(path)) for kind, path in (("plain", plain), ("chat", chat))}
    times: dict[str, list[float]] = {}

    whole: dict[str, list[float]] = {}

    def timed(name: str, path: Path, call: Callable[[Path], float]) -> None:
        """On the text, less the time on its first row."""
        first = path.with_name(f"first_{path.name}")
        with open(path, encoding="utf-8") as file:
            first.write_text(file.readline(), encoding="utf-8")
        start_up, total = call(first), call(path)
        whole.setdefault(name, []).append(total)
        times.setdefault(name, []).append(total - start_up)
        print(f"  {name}: {total:.1f} s, of that start-up {start_up:.1f} s", flush=True)

    def megatron(path: Path) -> float:
        start = time.perf_counter()
        command = [sys.executable, __file__, "--megatron-way", str(tokenizer_dir), str(path), str(folder / "megatron")]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    def bare_rate(path: Path, kind: str) -> float:
        seconds, mb = bare(tokenizer_dir, path, kind)
        return seconds / mb * size[kind]  # for all of the text

    for repeat in range(repeats):
        print(f"repeat {repeat + 1}", flush=True)
        for kind, path in (("plain", plain), ("chat", chat)):
            times.setdefault(f"{kind} bare", []).append(bare_rate(path, kind))
            print(f"  {kind} bare: {times[f'{kind} bare'][-1]:.1f} s for all of the text", flush=True)
            for backend in ("hf", "gigatoken"):
                timed(
                    f"{kind} {backend}",
                    path,
                    lambda p, k=kind, b=backend: tool(tokenizer_dir, p, k, b, folder / f"{k}_{b}"),
                )
        timed("plain megatron", plain, megatron)
    middle = {name: median(seconds) for name, seconds in times.items()}
    tokens = {kind: json.loads((folder / f"{kind}_hf.json").read_text())["num_tokens"] / 1e6 for kind in size}
    same = all(
        (folder / f"{kind}_hf{suffix}").read_bytes() == (folder / f"{kind}_gigatoken{suffix}").read_bytes()
        for kind in size
        for suffix in (".bin", ".idx", "_loss_mask.bin")
    )
    lines = [
        "## Throughput",
        "",
        f"{megabytes:.0f} MB of text, {CORES} workers, medians of {repeats} interleaved repeats. "
        "Seconds are those of the command less those"
        f" of the same command on the first row alone. hf and gigatoken wrote the same bytes: {same}.",
        "",
        "| arm | s | MB/s | docs/s | Mtok/s | s with start-up |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in sorted(middle.items()):
        kind, arm = name.split()
        label = (
            "one core's bare encode_batch_fast"
            if arm == "bare"
            else "Megatron-LM's way"
            if arm == "megatron"
            else f"mrlhf, {arm}"
        )
        rates = f"{size[kind] / seconds:.2f} | {docs[kind] / seconds:,.0f} | {tokens[kind] / seconds:.2f}"
        total = f"{median(whole[name]):.1f}" if name in whole else ""
        lines.append(f"| {kind}: {label} | {seconds:.1f} | {rates} | {total} |")
    lines += ["", "| ratio | measured | wanted |", "|---|---|---|"]
    for kind, wanted in (("plain", 0.90), ("chat", 0.85)):
        value = middle[f"{kind} bare"] / (CORES * middle[f"{kind} hf"])
        lines.append(f"| {kind}, hf: of {CORES} x one bare core | {value:.2f} | >= {wanted} |")
    for kind, wanted in (("plain", 8), ("chat", 3)):
        lines.append(
            f"| {kind}, gigatoken : hf | {middle[f'{kind} hf'] / middle[f'{kind} gigatoken']:.1f} | >= {wanted} |"
        )
    for arm, wanted in (("hf", 1.3), ("gigatoken", 8)):
        lines.append(
            f"| plain, {arm} : Megatron-LM's way | {middle['plain megatron'] / middle[f'plain {arm}']:.2f} | "
            f">= {wanted} |"
        )
    return [*lines, ""]


def _texts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["text"] if "text" in row else "".join(m["content"] for m in row["messages"])


# ---- packing -------------------------------------------------------------------------------------


def packing(count: int = 1_000_000, capacity: int = 4096) -> list[str]:
    from mrlhf.data.pack import pack

    rng = np.random.default_rng(0)
    short = rng.random(count) < 0.9
    cases = {
        "log-normal (median 365)": rng.lognormal(5.9, 1.0, count),
        "uniform 1..4096": rng.integers(1, capacity + 1, count),
        "bimodal (90 % near 220, 10 % near 2900)": np.where(
            short, rng.normal(220, 60, count), rng.normal(2900, 300, count)
        ),
        "all just over half": rng.integers(capacity // 2 + 1, capacity // 2 + 60, count),
    }
    lines = [
        "## Packing",
        "",
        (
            f"{count:,} lengths, capacity {capacity}, one core; the bound is ceil(sum / capacity). "
            "Two samples of more than half never share a pack, so that"
        ),
        "the last case's optimum is a pack a sample.",
        "",
        "| lengths | CPU s | packs | packs : bound | fill rate |",
        "|---|---|---|---|---|",
    ]
    for name, values in cases.items():
        lengths = np.clip(values.astype(np.int64), 1, capacity)
        start = time.process_time()
        packs = len(pack(lengths, capacity=capacity))
        seconds = time.process_time() - start
        bound = -(-int(lengths.sum()) // capacity)
        lines.append(
            f"| {name} | {seconds:.2f} | {packs:,} | {packs / bound:.4f} | {lengths.sum() / (packs * capacity):.2%} |"
        )
    return [*lines, ""]


# ---- memory --------------------------------------------------------------------------------------


def peak_pss(command: list[str]) -> tuple[float, float]:
    """(largest sum of the proportional set sizes of the command and its children in MiB, seconds)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    peak = 0
    while process.poll() is None:
        total = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
                if int(fields[3]) == process.pid:  # of its session
                    rollup = (status.parent / "smaps_rollup").read_text()
                    total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            except (OSError, StopIteration):
                continue  # the process ended meanwhile
        peak = max(peak, total)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return peak / 1024, time.perf_counter() - start


def memory(folder: Path, gigabytes: float) -> list[str]:
    tokenizer_dir = folder / "tokenizer"
    if not tokenizer_dir.exists():
        make_tokenizer(tokenizer_dir)
    unit, _ = write_corpus(folder, 50)
    data = unit.read_bytes()
    lines = [
        "## Memory",
        "",
        f"Largest sum of proportional set sizes of the command and its {CORES} workers (pretrain, gigatoken, "
        "seq-length 8192);"
        f" allowed: 1 GiB + {CORES} x 300 MiB = {1024 + 300 * CORES} MiB.",
        "",
        "| input | peak MiB | seconds |",
        "|---|---|---|",
    ]
    big = folder / "big.jsonl"
    for share in (0.02, 0.2, 1.0):
        with open(big, "wb") as file:
            for _ in range(max(1, round(share * gigabytes * 1e9 / len(data)))):
                file.write(data)
        command = [
            sys.executable,
            "tools/preprocess_data.py",
            "--task",
            "pretrain",
            "--input",
            str(big),
            "--tokenizer",
            str(tokenizer_dir),
        ]
        command += [
            "--output-prefix",
            str(folder / "big"),
            "--seq-length",
            "8192",
            "--workers",
            str(CORES),
            "--overwrite",
        ]
        peak, seconds = peak_pss([*command, "--tokenizer-backend", "gigatoken"])
        lines.append(f"| {big.stat().st_size / 1e9:.2f} GB | {peak:.0f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=("throughput", "packing", "memory"), default=["throughput", "packing", "memory"]
    )
    parser.add_argument("--mb", type=float, default=200, help="megabytes of text for the throughput")
    parser.add_argument("--gigabytes", type=float, default=5, help="largest input for the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/preprocess.md")
    parser.add_argument("--megatron-way", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.megatron_way:
        return megatron_way(*args.megatron_way)
    arguments = " ".join(sys.argv[1:])
    lines = [
        "# Preprocessing",
        "",
        f"`python benchmarks/preprocess.py {arguments}`".replace(" `", "`")
        + f" on {CORES} cores ({platform.machine()}).",
        "",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "packing" in args.only:
            lines += packing()
        if "throughput" in args.only:
            lines += throughput(folder, args.mb, args.repeats)
        if "memory" in args.only:
            lines += memory(folder, args.gigabytes)
    text = "\n".join(lines)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
