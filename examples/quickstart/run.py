"""The whole pipeline on a CPU, as ordinary commands that are printed before they run: `make quickstart`.

    python examples/quickstart/run.py [--seed 1] [--output-dir runs/quickstart] [--fresh]

corpus -> tokenizer -> packed data -> pretrain -> SFT -> reward model -> PPO -> Hugging Face model -> gold reward before
and after -> report. A step that has finished with the same commands and files is skipped; one that was interrupted goes
on. `--fresh` starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = "examples/quickstart"
DEFAULT_OUTPUT = "runs/quickstart"
# Data-parallel ranks of the three stages before PPO; 1 runs them without torchrun, on two threads.
RANKS = 2
SEQ_LENGTH = 256
PROMPT_LENGTH = 64
SPLITS = {
    "pretrain": ("pretrain",),
    "sft": ("sft_train", "sft_eval"),
    "preference": ("pref_train", "pref_eval"),
    "prompts": ("prompts_train",),
}


@dataclass(frozen=True)
class Step:
    """Commands that belong together; `outputs` must exist for the step to count as finished.

    `directory` is deleted when the step starts, but not when it goes on after an interruption:
    a training stage would refuse to resume another run.
    """

    name: str
    commands: tuple[str, ...]
    outputs: tuple[str, ...]
    directory: str | None = None


def stage(name: str, out: str, seed: int, *, ranks: int, **paths: str) -> str:
    """The command of a training stage. The paths are in its YAML; they are given only when `out` is not the default."""
    launcher = (
        f"torchrun --standalone --nproc-per-node {ranks} -m mrlhf" if ranks > 1 else "OMP_NUM_THREADS=2 python -m mrlhf"
    )
    options = {"train.output_dir": f"{out}/{name}", **{key.replace("__", "."): value for key, value in paths.items()}}
    overrides = "" if out == DEFAULT_OUTPUT else "".join(f" --{key} {value}" for key, value in options.items())
    return f"{launcher} {name} --config {HERE}/{name}.yaml --train.seed {seed}{overrides}"


def answers(out: str, name: str, checkpoint: str, seed: int) -> tuple[str, ...]:
    """Greedy answers to the held-out prompts, and their gold reward."""
    return (
        f"python -m mrlhf generate --checkpoint {checkpoint} --prompts {out}/data/prompts_eval.jsonl "
        f"--output {out}/eval/{name}.jsonl"
        f" --temperature 0 --max-new-tokens 12 --dtype float32 --kv-cache-mib 64 --seed {seed}",
        (
            f"python {HERE}/evaluate.py --answers {out}/eval/{name}.jsonl --tokenizer {out}/base "
            f"--output {out}/eval/{name}.json"
        ),
    )


def steps(out: str, seed: int) -> list[Step]:
    """Every step in order."""
    data = f"{out}/data"
    preprocess = tuple(
        f"python tools/preprocess_data.py --task {task} --input {data}/{split}.jsonl --tokenizer {out}/base "
        f"--output-prefix {data}/{split}"
        f" --seq-length {PROMPT_LENGTH if task == 'prompts' else SEQ_LENGTH} --overwrite"
        for task, splits in SPLITS.items()
        for split in splits
    )

    def training(name: str, *, ranks: int = RANKS, **paths: str) -> Step:
        command = stage(name, out, seed, ranks=ranks, **paths)
        return Step(name, (command,), (f"{out}/{name}/metrics.jsonl",), directory=f"{out}/{name}")

    def evaluation(title: str, name: str, checkpoint: str) -> Step:
        return Step(title, answers(out, name, checkpoint, seed), (f"{out}/eval/{name}.json",))

    runs = " ".join(f"{out}/{name}" for name in ("pretrain", "sft", "rm", "ppo"))
    export = f"python tools/convert/megatron_to_hf.py --checkpoint {out}/ppo --output {out}/hf --dtype float32"
    return [
        Step(
            "corpus", (f"python {HERE}/corpus.py --output-dir {data} --seed {seed}",), (f"{data}/prompts_eval.jsonl",)
        ),
        Step(
            "tokenizer",
            (f"python {HERE}/tokenizer.py --data-dir {data} --output-dir {out}/base",),
            (f"{out}/base/config.json",),
        ),
        Step("preprocess", preprocess, tuple(f"{data}/{split}.json" for splits in SPLITS.values() for split in splits)),
        training("pretrain", model__path=f"{out}/base", data__train=f"{data}/pretrain"),
        training("sft", model__path=f"{out}/pretrain", data__train=f"{data}/sft_train", data__eval=f"{data}/sft_eval"),
        evaluation("evaluate SFT", "sft", f"{out}/sft"),
        training("rm", model__path=f"{out}/sft", data__train=f"{data}/pref_train", data__eval=f"{data}/pref_eval"),
        training(
            "ppo",
            ranks=2,
            model__path=f"{out}/sft",
            data__train=f"{data}/prompts_train",
            reward__sources=f"model:{out}/rm",
        ),
        Step("export", (export,), (f"{out}/hf/config.json",), directory=f"{out}/hf"),
        evaluation("evaluate PPO", "ppo", f"{out}/hf"),
        Step("report", (f"python -m mrlhf report {runs} --output {out}/report.html",), (f"{out}/report.html",)),
    ]


def environment() -> dict[str, str]:
    """That of a shell after `source .venv/bin/activate`: `python` and `torchrun` are those of this interpreter."""
    bin_dir = Path(sys.executable).parent
    path = f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        "MRLHF_DEVICE": "cpu",
        **os.environ,
        "PATH": path,
        "VIRTUAL_ENV": str(bin_dir.parent),
        "PYTHONUNBUFFERED": "1",
    }


def run_command(command: str, step: str) -> None:
    print(f"$ {command}", flush=True)
    env, words = environment(), shlex.split(command)
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        env[key] = value
    status = subprocess.run(words, cwd=ROOT, env=env, check=False).returncode
    if status:
        sys.exit(
            f"\nquickstart: step '{step}' failed with status {status}. The command was:\n\n    {command}\n\n"
            "Its output is above. The finished steps are kept: the same quickstart command goes on from here."
        )


def mark(out: Path, step: Step, state: str) -> Path:
    """The file that holds the step's identity once it is `started` or `done`."""
    return out / ".done" / f"{step.name.replace(' ', '_')}.{state}"


def identity(step: Step) -> str:
    """The step's commands and a digest of the example's files they read:
    an edited YAML file makes the step run again.
    """
    words = {word for command in step.commands for word in command.split()}
    files = sorted(word for word in words if word.startswith(HERE) and (ROOT / word).is_file())
    digest = hashlib.sha256(b"\0".join((ROOT / file).read_bytes() for file in [*files, f"{HERE}/gold.py"]))
    return "\n".join([*step.commands, digest.hexdigest()])


def says(path: Path, step: Step) -> bool:
    return path.is_file() and path.read_text() == identity(step)


def missing(step: Step) -> list[str]:
    return [output for output in step.outputs if not (ROOT / output).exists()]


def run_steps(todo: list[Step], out: Path) -> None:
    """Runs what is not finished; after the first step that runs, all later ones start anew."""
    began = time.monotonic()
    stale = False
    for number, step in enumerate(todo, start=1):
        title = f"[{number}/{len(todo)}] {step.name}"
        if not stale and says(mark(out, step, "done"), step) and not missing(step):
            print(f"{title}: finished before, skipped", flush=True)
            continue
        stale = True
        print(f"\n{title}", flush=True)
        goes_on = says(mark(out, step, "started"), step)
        mark(out, step, "done").unlink(missing_ok=True)
        for later in todo[number:]:
            for state in ("started", "done"):
                mark(out, later, state).unlink(missing_ok=True)
        if step.directory and not goes_on:
            shutil.rmtree(ROOT / step.directory, ignore_errors=True)
        mark(out, step, "started").write_text(identity(step))
        start = time.monotonic()
        for command in step.commands:
            run_command(command, step.name)
        if missing(step):
            sys.exit(f"\nquickstart: step '{step.name}' reported success, but {', '.join(missing(step))} is missing")
        mark(out, step, "started").rename(mark(out, step, "done"))
        print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nall steps: {time.monotonic() - began:.0f} s")


def summary(out: str) -> str:
    """The figures at the end: before is the SFT model, after is the exported PPO model,
    both greedy on the held-out prompts.
    """
    before, after = (json.loads((ROOT / out / "eval" / f"{name}.json").read_text()) for name in ("sft", "ppo"))
    rollouts: list[dict[str, Any]] = [
        json.loads(line) for line in (ROOT / out / "ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    kl = [row["objective/kl"] for row in rollouts if "objective/kl" in row]
    sampled = [row["response_length/mean"] for row in rollouts if "response_length/mean" in row]
    gain = after["gold_reward"] - before["gold_reward"]
    return "\n".join(
        [
            (
                f"gold reward before PPO   {before['gold_reward']:.3f}   (SFT; "
                f"{before['answers']} held-out prompts, greedy)"
            ),
            f"gold reward after PPO    {after['gold_reward']:.3f}",
            f"gain                     {gain:+.3f}",
            f"response length          {before['response_length']:.2f} -> {after['response_length']:.2f} tokens"
            f"   (while training {sampled[0]:.2f} -> {sampled[-1]:.2f})",
            (
                f"KL to the SFT model      {mean(kl[-5:]):.3f} nats an answer   "
                f"(mean of the last {len(kl[-5:])} of {len(kl)} rollouts)"
            ),
            f"report                   {out}/report.html",
        ]
    )


def start_over(out: Path) -> None:
    """Deletes `out`, if a quickstart made it."""
    if not out.exists():
        return
    if not (out / ".done").is_dir() and any(out.iterdir()):
        sys.exit(
            f"quickstart: --fresh would delete {out}, which no quickstart has made; "
            "delete it yourself or choose another --output-dir"
        )
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output-dir", default=DEFAULT_OUTPUT, help="relative to the repository root, or absolute")
    parser.add_argument("--fresh", action="store_true", help="delete the output directory first")
    args = parser.parse_args()
    given = args.output_dir.rstrip("/")
    if not re.fullmatch(r"[\w./+-]+", given):
        sys.exit(
            f"quickstart: --output-dir {given!r}: letters, digits and ./_+- only, "
            "because it becomes part of many commands"
        )
    out = ROOT / given
    if args.fresh:
        start_over(out)
    for directory in (out, out / "eval", out / ".done"):
        directory.mkdir(parents=True, exist_ok=True)
    run_steps(steps(given, args.seed), out)
    print(summary(given))


if __name__ == "__main__":
    main()
