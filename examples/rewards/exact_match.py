"""A rule reward for maths answers: 1 if the final answer equals the label, else 0.

Use it as the reward source `examples/rewards/exact_match.py:exact_match`.

A reward function has the signature

    f(prompts, completions, **columns) -> list[float]

prompts, completions: lists of decoded strings, one entry an answer (special tokens left out). columns: lists of the
same length: `label` (whatever the prompt record's label column holds, None where it has none), `prompt_ids` and
`completion_ids` (token ids). It returns one finite number an answer, in order; anything else stops the run.
"""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")


def exact_match(prompts: list[str], completions: list[str], *, label: list, **columns: list) -> list[float]:
    """1.0 where the answer's final number (or boxed text) equals the label's, else 0.0.
    Raises ValueError for a prompt without a label.
    """
    missing = [i for i, wanted in enumerate(label) if wanted is None]
    if missing:
        raise ValueError(
            f"exact_match needs a label for every prompt; missing for {len(missing)}, first: {prompts[missing[0]]!r}"
        )
    pairs = zip(completions, label, strict=True)
    return [float(normalise(final_answer(text)) == normalise(final_answer(str(wanted)))) for text, wanted in pairs]


def final_answer(text: str) -> str:
    """What follows the last `####` (GSM8K), else the content of the last `\\boxed{}` (MATH), else the last number,
    else the text.
    """
    if "####" in text:
        lines = text.rpartition("####")[2].strip().splitlines()
        return lines[0] if lines else ""
    boxed = text.rpartition("\\boxed{")
    if boxed[1]:
        return _until_closing_brace(boxed[2])
    found = NUMBER.findall(text)
    return found[-1] if found else text


def normalise(answer: str) -> Fraction | str:
    """A number as an exact fraction ("1,000.0" == "1000", "1/2" == "0.5"); other text without case and white space."""
    bare = answer.strip().strip("$").rstrip(".").replace(",", "").replace(" ", "")
    # Fraction alone would also read "1e999999999", and fill the memory with it
    if not NUMBER.fullmatch(bare):
        return bare.lower()
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return bare.lower()


def _until_closing_brace(text: str) -> str:
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:i]
    return text
