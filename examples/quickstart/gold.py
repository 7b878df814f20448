"""The quickstart's tasks, and the program that checks an answer: `examples/quickstart/gold.py:gold_reward`.

Five small tasks on capital letters and digits, each of which is one token of the quickstart's tokenizer. An answer is
right when it is exactly the result and nothing else. The file stands alone, so that it can be named as a reward source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One kind of task. `phrases` hold `{}` for the argument; the first one is what `and {}?` repeats."""

    name: str
    phrases: tuple[str, ...]
    solve: Callable[[str], str]


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("copy", ("repeat {}", "say {} once more"), lambda a: a),
        Family("reverse", ("reverse {}", "write {} backwards"), lambda a: a[::-1]),
        Family("sort", ("sort {}", "put {} in order"), lambda a: "".join(sorted(a))),
        Family("last", ("last of {}", "what is the end of {}?"), lambda a: a[-1]),
        Family("largest", ("largest of {}", "which of {} is the most?"), lambda a: max(a)),
    )
}
FOLLOW_UP = "and {}?"
_PATTERNS = [
    (family, re.compile(re.escape(phrase).replace(r"\{\}", r"([A-Z0-9]+)")))
    for family in FAMILIES.values()
    for phrase in family.phrases
]
_FOLLOW_UP = re.compile(re.escape(FOLLOW_UP).replace(r"\{\}", r"(.+)"))
_SPECIAL = re.compile(r"<\|[a-z0-9_]+\|>")


def parse(messages: Sequence[dict[str, str]]) -> tuple[Family, str]:
    """The task of the last user turn and its argument; `and X?` repeats the task of the turn before."""
    family = None
    argument = ""
    for message in messages:
        if message["role"] != "user":
            continue
        again = _FOLLOW_UP.fullmatch(message["content"])
        if again and family:
            argument = again.group(1)
            continue
        for candidate, pattern in _PATTERNS:
            found = pattern.fullmatch(message["content"])
            if found:
                family, argument = candidate, found.group(1)
                break
        else:
            raise ValueError(f"not one of the quickstart's tasks: {message['content']!r}")
    if family is None:
        raise ValueError("a prompt without a user turn")
    return family, argument


def right_answer(messages: Sequence[dict[str, str]]) -> str:
    """The one answer that `gold_reward` takes."""
    family, argument = parse(messages)
    return family.solve(argument)


def clean(completion: str) -> str:
    """The text up to the end of the turn, without special tokens and outer white space."""
    return _SPECIAL.sub("", completion.split("<|im_end|>")[0].split("<|endoftext|>")[0]).strip()


def gold_reward(
    prompts: Sequence[Any], completions: Sequence[str], label: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """1 for exactly the right answer, 0 for anything else.
    Without `label` the answer is worked out from the prompt's messages.
    """
    answers = label if label is not None else [right_answer(prompt) for prompt in prompts]
    return [float(clean(completion) == answer) for completion, answer in zip(completions, answers, strict=True)]
