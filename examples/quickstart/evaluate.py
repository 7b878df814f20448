"""Gold reward and length of generated answers.

    python examples/quickstart/evaluate.py --answers G.jsonl --tokenizer runs/quickstart/base --output scores.json

G.jsonl is what `mrlhf generate` writes: the columns of the prompts and `completions`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from gold import gold_reward, parse
from tokenizers import Tokenizer


def evaluate(answers: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Mean gold reward over all answers, the same by task, and the mean length in tokens without the end-of-turn
    token.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    lengths: list[int] = []
    with answers.open() as lines:
        for line in lines:
            row = json.loads(line)
            completions = row["completions"]
            count = len(completions)
            scores[parse(row["prompt"])[0].name] += gold_reward(
                [row["prompt"]] * count, completions, [row["label"]] * count
            )
            lengths += [len(tokenizer.encode(completion, add_special_tokens=False).ids) for completion in completions]
    return {
        "gold_reward": mean(score for family in scores.values() for score in family),
        "response_length": mean(lengths),
        "answers": len(lengths),
        "by_task": {name: mean(scores[name]) for name in sorted(scores)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    result = evaluate(args.answers, Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    tasks = "  ".join(f"{name} {score:.2f}" for name, score in result["by_task"].items())
    print(f"gold reward {result['gold_reward']:.3f}   response length {result['response_length']:.2f} tokens   {tasks}")


if __name__ == "__main__":
    main()
