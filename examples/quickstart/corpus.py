"""Writes the quickstart's corpus: small tasks whose answers a program can check, the same files for the same seed.

    python examples/quickstart/corpus.py --output-dir runs/quickstart/data --seed 1

    pretrain.jsonl              `text`: solved tasks and plain sentences
    sft_{train,eval}.jsonl      `messages`: conversations with imperfect last answers (see below)
    pref_{train,eval}.jsonl     `prompt`, `chosen` (right), `rejected` (wrong)
    prompts_{train,eval}.jsonl  `prompt`, `label` (the right answer)

The demonstrations are wrong in a set share of the cases, and not at random: four of the five tasks have a bad habit
(sorting downwards, copying instead of reversing ...) that shows up more often than the right answer. Imitation learns
the habit. A reward model that has seen right answers preferred lets PPO unlearn it, because the right answer is still
sampled now and then.

Held out are the tasks, not the wordings: a (task, argument) pair of an evaluation file's last turn occurs in no
training file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gold import FAMILIES, FOLLOW_UP, Family

ALPHABETS = ("ABCDEF", "123456")
DIGITS_ONLY = ("largest",)
SYSTEMS = ("be brief.", "give the result only.", "you are a careful helper.")
FORMS = ("{q}: {a}\n", "question: {q}\nanswer: {a}\n", "user\n{q}\nassistant\n{a}\n")
Message = dict[str, str]

# family -> (share of wrong demonstrations, the wrong answer most of them give)
WRONG: dict[str, tuple[float, str]] = {
    "copy": (0.20, "cut"),
    "reverse": (0.52, "copied"),
    "sort": (0.56, "downwards"),
    "last": (0.56, "first"),
    "largest": (0.56, "opposite"),
}


def word(rng: random.Random, alphabet: str) -> str:
    return "".join(rng.choices(alphabet, k=rng.choice((2, 3, 3, 3))))


def argument(family: Family, rng: random.Random, text: str | None = None) -> str:
    """A random argument of the task, made of `text` if given."""
    return text or word(rng, ALPHABETS[1] if family.name in DIGITS_ONLY else rng.choice(ALPHABETS))


def held_out(family: Family, arg: str) -> bool:
    """Whether the task belongs to the evaluation files; a property of the task, whatever the seed."""
    return hashlib.sha256(f"{family.name} {arg}".encode()).digest()[0] < 26


def draw(rng: random.Random, *, evaluation: bool) -> tuple[Family, str]:
    family = rng.choice(list(FAMILIES.values()))
    while True:
        arg = argument(family, rng)
        if held_out(family, arg) == evaluation:
            return family, arg


def wrong_answers(family: Family, arg: str, rng: random.Random) -> dict[str, str]:
    """Plausible mistakes by kind; none of them equals the right answer.

    `slip`, `mixed` and `runs_on` are what a model samples that is not sure,
    and what PPO finds when the reward model has not seen them.
    """
    right = family.solve(arg)
    symbols = ALPHABETS[right.isdigit()]
    at = rng.randrange(len(right))
    found: dict[str, str] = {
        "wordy": f"the answer is {right}",
        "slip": right[:at] + rng.choice(symbols) + right[at + 1 :],
        "runs_on": right + rng.choice((right[-2:], right, rng.choice(symbols), " of it", f" {arg}")),
    }
    if family.name in ("copy", "reverse", "sort"):
        found["copied"] = arg
        found["reversed"] = arg[::-1]
        found["downwards"] = "".join(sorted(arg, reverse=True))
        found["swapped"] = right[:-2] + right[-1] + right[-2]
        found["cut"] = right[:-1]
        found["doubled"] = right + right[-1]
        found["mixed"] = "".join(rng.sample(right, len(right)))
    elif family.name == "last":
        found["first"] = arg[0]
        found["middle"] = arg[1]
        found["copied"] = arg
    else:
        found["opposite"] = min(arg)
        found["first"] = arg[0]
        found["middle"] = sorted(arg)[1]
        found["copied"] = arg
    return {kind: answer for kind, answer in found.items() if answer != right}


def wrong_answer(family: Family, arg: str, rng: random.Random) -> str:
    """The family's habit in nine of ten cases, else one of the other mistakes."""
    candidates = wrong_answers(family, arg, rng)
    habit = WRONG[family.name][1]
    if habit in candidates and rng.random() < 0.9:
        return candidates[habit]
    return rng.choice(list(candidates.values()))


def prompt(rng: random.Random, *, evaluation: bool) -> tuple[list[Message], Family, str]:
    """Messages that end in a user turn, with a system turn or earlier turns now and then,
    and the task of that last turn.

    Earlier answers are right and their tasks never held out.
    """
    family, arg = draw(rng, evaluation=evaluation)
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    phrase = rng.choice(family.phrases)
    if rng.random() < 0.15:
        earlier = draw(rng, evaluation=False)
        while rng.random() < 0.5 and earlier[0] is not family:
            earlier = draw(rng, evaluation=False)
        messages.append({"role": "user", "content": rng.choice(earlier[0].phrases).format(earlier[1])})
        messages.append({"role": "assistant", "content": earlier[0].solve(earlier[1])})
        if earlier[0] is family:
            phrase = FOLLOW_UP
    messages.append({"role": "user", "content": phrase.format(arg)})
    return messages, family, arg


def filler(rng: random.Random) -> str:
    noun = ("cat", "dog", "bird", "tree", "river", "child", "teacher", "letter", "number", "word", "book", "house")
    verb = ("sees", "finds", "likes", "takes", "gives", "reads", "keeps")
    kind = ("small", "old", "red", "quiet", "careful", "long", "first", "last", "brief")
    return f"the {rng.choice(kind)} {rng.choice(noun)} {rng.choice(verb)} the {rng.choice(kind)} {rng.choice(noun)}.\n"


def pretrain_rows(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Documents of up to eight entries: solved tasks, all of them right, and now and then a sentence.

    Neighbouring tasks share their argument: a small model learns to look arguments up much sooner when they come back.
    """
    for _ in range(count):
        entries: list[str] = []
        while len(entries) < 8:
            if rng.random() < 0.1:
                entries.append(filler(rng))
                continue
            text = word(rng, rng.choice(ALPHABETS))
            for family in rng.sample([f for f in FAMILIES.values() if text.isdigit() or f.name not in DIGITS_ONLY], 3):
                arg = argument(family, rng, text)
                if not held_out(family, arg):
                    entries.append(
                        rng.choice(FORMS).format(q=rng.choice(family.phrases).format(arg), a=family.solve(arg))
                    )
        yield {"text": "".join(entries)}


def sft_rows(rng: random.Random, count: int, *, evaluation: bool, wrong_share: float) -> Iterator[dict[str, Any]]:
    scale = wrong_share * len(WRONG) / sum(share for share, _ in WRONG.values())
    for _ in range(count):
        messages, family, arg = prompt(rng, evaluation=evaluation)
        wrong = rng.random() < min(1.0, WRONG[family.name][0] * scale)
        answer = wrong_answer(family, arg, rng) if wrong else family.solve(arg)
        yield {"messages": [*messages, {"role": "assistant", "content": answer}]}


def pref_rows(rng: random.Random, count: int, *, evaluation: bool) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        messages, family, arg = prompt(rng, evaluation=evaluation)
        candidates = wrong_answers(family, arg, rng)
        likely = [candidates[kind] for kind in (WRONG[family.name][1], "slip", "runs_on") if kind in candidates]
        rejected = rng.choice(likely if likely and rng.random() < 0.7 else list(candidates.values()))
        yield {
            "prompt": messages,
            "chosen": [{"role": "assistant", "content": family.solve(arg)}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def prompt_rows(rng: random.Random, count: int, *, evaluation: bool) -> Iterator[dict[str, Any]]:
    """No prompt twice."""
    seen: set[str] = set()
    while len(seen) < count:
        messages, family, arg = prompt(rng, evaluation=evaluation)
        key = json.dumps(messages)
        if key not in seen:
            seen.add(key)
            yield {"prompt": messages, "label": family.solve(arg)}


def write_corpus(output_dir: Path, *, seed: int, wrong_share: float, scale: float = 1.0) -> dict[str, int]:
    """Writes every file; returns rows by file name. `scale` shrinks or grows all of them."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    def rows(count: int) -> int:
        return max(8, round(count * scale))

    files: dict[str, Iterator[dict[str, Any]]] = {"pretrain": pretrain_rows(rng("pretrain"), rows(8000))}
    for split, share in (("train", 1.0), ("eval", 0.06)):
        evaluation = split == "eval"
        files[f"sft_{split}"] = sft_rows(
            rng(f"sft_{split}"), rows(int(6000 * share)), evaluation=evaluation, wrong_share=wrong_share
        )
        files[f"pref_{split}"] = pref_rows(rng(f"pref_{split}"), rows(int(22000 * share)), evaluation=evaluation)
        files[f"prompts_{split}"] = prompt_rows(
            rng(f"prompts_{split}"), rows(300 if evaluation else 8000), evaluation=evaluation
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, content in files.items():
        lines = [json.dumps(row) + "\n" for row in content]
        (output_dir / f"{name}.jsonl").write_text("".join(lines))
        counts[name] = len(lines)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--wrong-share", type=float, default=0.48, help="share of the demonstrations' last answers that are wrong"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of rows of every file")
    args = parser.parse_args()
    counts = write_corpus(args.output_dir, seed=args.seed, wrong_share=args.wrong_share, scale=args.scale)
    print(f"{args.output_dir}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
