"""The best of several answers as a row for sft, the best and the worst as a row for rm and dpo: `mrlhf generate --best_of N`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Prompt = list[dict[str, Any]] | str


@dataclass(frozen=True)
class Choice:
    """Of one prompt's answers: the index of the best and of the worst (None: no answer is worse than the best, or has another text)."""

    best: int
    worst: int | None


def choose(texts: Sequence[str], scores: Sequence[float], stopped: Sequence[bool]) -> Choice | None:
    """The best is the highest score among answers that ended by themselves and are not empty: one that was cut would teach not to stop.

    The worst is the lowest score of all non-empty answers. Of equal scores the first. None where no answer can be the best.
    """
    whole = [i for i, text in enumerate(texts) if stopped[i] and text.strip()]
    if not whole:
        return None
    best = max(whole, key=lambda i: (scores[i], -i))
    worse = [i for i, text in enumerate(texts) if text.strip() and text != texts[best] and scores[i] < scores[best]]
    return Choice(best, min(worse, key=lambda i: (scores[i], i)) if worse else None)


def sft_row(record: Row, prompt: Prompt, text: str, score: float) -> Row:
    """A row of --task sft: messages, or input and output where the prompt is a string."""
    if isinstance(prompt, str):
        return {"input": prompt, "output": text, "score": score}
    return {"messages": [*prompt, _answer(text)], "score": score, **_tools(record)}


def pair_row(record: Row, prompt: Prompt, best: str, worst: str, scores: tuple[float, float]) -> Row:
    """A row of --task preference; `scores` of the best and the worst."""
    columns = {"score_chosen": scores[0], "score_rejected": scores[1]}
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": best, "rejected": worst, **columns}
    return {"prompt": prompt, "chosen": [_answer(best)], "rejected": [_answer(worst)], **columns, **_tools(record)}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _tools(record: Row) -> Row:
    return {"tools": record["tools"]} if record.get("tools") else {}
