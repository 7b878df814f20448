"""`mrlhf generate --best_of N`: the best of several answers as an sft row, best and worst as an rm and dpo row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Prompt = list[dict[str, Any]] | str


@dataclass(frozen=True)
class Choice:
    """Indices of the best and the worst answer to one prompt.

    worst is None if no answer has a lower score and another text than the best.
    """

    best: int
    worst: int | None


def choose_best_and_worst(texts: Sequence[str], scores: Sequence[float], stopped: Sequence[bool], *,
                          tolerance: float = 0.0) -> Choice | None:
    """The answers with the highest and the lowest score; the first of equal ones. None if no answer can be the best.

    tolerance: scores within this x max(1, largest |score|) are equal (reward.equal_tolerance).

    The best must have stopped by itself and not be empty: an answer that was cut off would teach the model not to stop.
    The worst is any non-empty answer.
    """
    whole = [i for i, text in enumerate(texts) if stopped[i] and text.strip()]
    if not whole:
        return None
    margin = tolerance * max(1.0, *map(abs, scores))
    top = max(scores[i] for i in whole)
    best = next(i for i in whole if scores[i] >= top - margin)
    worse = [i for i, text in enumerate(texts) if text.strip() and text != texts[best] and scores[i] < top - margin]
    return Choice(best, min(worse, key=lambda i: (scores[i], i)) if worse else None)


def sft_row(record: Row, prompt: Prompt, text: str, score: float) -> Row:
    """A row of --task sft: messages, or input and output where the prompt is a string."""
    if isinstance(prompt, str):
        return {"input": prompt, "output": text, "score": score}
    return {"messages": [*prompt, _answer(text)], "score": score, **_tools(record)}


def pair_row(record: Row, prompt: Prompt, best: str, worst: str, scores: tuple[float, float]) -> Row:
    """A row of --task preference. scores: of the best and of the worst."""
    columns = {"score_chosen": scores[0], "score_rejected": scores[1]}
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": best, "rejected": worst, **columns}
    return {"prompt": prompt, "chosen": [_answer(best)], "rejected": [_answer(worst)], **columns, **_tools(record)}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _tools(record: Row) -> Row:
    return {"tools": record["tools"]} if record.get("tools") else {}
