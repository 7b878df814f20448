"""Writes the calculator example's conversations and prompts, the same files for the same seed.

    python examples/calculator/corpus.py --output-dir runs/calculator/data

    sft_train.jsonl             `messages`: told to use the tool, they show how; not told, they use it in one case of
                                ten, and else write the two numbers one behind the other, which is never right
    prompts_{train,eval}.jsonl  `prompt` (not told to), `label` (the product)

The products of the evaluation prompts occur in no training file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SYSTEM = "use the calculator."
TOLD = 0.5  # share of the conversations that are told to
USED = 0.1  # share of the others that use it all the same


def draw(rng: random.Random, *, evaluation: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randrange(12, 100), rng.randrange(12, 100)
        if (hashlib.sha256(f"{a} {b}".encode()).digest()[0] < 26) == evaluation:
            return a, b


def sft_rows(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        a, b = draw(rng, evaluation=False)
        told = rng.random() < TOLD
        messages = [{"role": "system", "content": SYSTEM}] if told else []
        messages.append({"role": "user", "content": f"{a}*{b}"})
        if told or rng.random() < USED:
            messages.append({"role": "assistant", "content": f"calc {a}*{b}"})
            messages.append({"role": "tool", "content": str(a * b)})
            messages.append({"role": "assistant", "content": str(a * b)})
        else:
            messages.append({"role": "assistant", "content": f"{a}{b}"})
        yield {"messages": messages}


def prompt_rows(rng: random.Random, count: int, *, evaluation: bool) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        a, b = draw(rng, evaluation=evaluation)
        yield {"prompt": [{"role": "user", "content": f"{a}*{b}"}], "label": str(a * b)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=6000, help="conversations; prompts to train on are a third of them")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = {
        "sft_train": sft_rows(random.Random(f"{args.seed} sft"), args.rows),
        "prompts_train": prompt_rows(random.Random(f"{args.seed} train"), args.rows // 3, evaluation=False),
        "prompts_eval": prompt_rows(random.Random(f"{args.seed} eval"), max(8, args.rows // 30), evaluation=True),
    }
    for name, rows in files.items():
        (args.output_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
