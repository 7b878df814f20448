"""Keeps special tokens in users' text apart from those that the template writes.

While a template is rendered, one-character markers stand for special tokens in users' text (`protect`, `restore`). If
the rendered text still holds such text, it is encoded the other way round (`guard`): the *template's* special tokens
become markers, and a copy of the tokenizer (encoder.py) has these markers as its only special tokens. So users' text
can name no special token, and the text around it is encoded as usual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mrlhf.errors import RowProblem

Span = tuple[int, int]
OPEN, CLOSE = "\U000ffffc", "\U000ffffd"  # stand around a {% generation %} block while it is rendered
_FIRST = 0xF0000  # first marker while rendering
_MARKERS = re.compile("[\U000f0000-\U000ffffd]")
_FIRST_GUARD = 0x100000
_GUARDS = re.compile("[\U00100000-\U0010fffd]")


@dataclass(frozen=True)
class Rendered:
    """`text`, its trained character spans [start, end), and the spans of users' text that looks like special tokens."""

    text: str
    trained: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that the tokenizer reads as special tokens, without blank ones, which look like ordinary text."""
    return sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content.strip()})


class SpecialTokens:
    """The special tokens of a tokenizer, and how to keep users' text from being read as one."""

    def __init__(self, tokens: list[str]):
        by_length = sorted(tokens, key=len, reverse=True)
        alternatives = "|".join(re.escape(t) for t in by_length)
        self.pattern = re.compile(alternatives or r"(?!)")
        self.guards = {token: chr(_FIRST_GUARD + i) for i, token in enumerate(tokens)}
        self._unsafe = re.compile(f"{alternatives}|{_MARKERS.pattern}" if alternatives else _MARKERS.pattern)
        self._beginnings = tuple({t[:2] for t in tokens})
        self._needles = (*self._beginnings, OPEN, CLOSE)
        self._longest = max(map(len, tokens), default=0)
        self._firsts, self._lasts = {t[0] for t in tokens}, {t[-1] for t in tokens}
        self._heads = {t[:i] for t in tokens for i in range(1, len(t)) if not t[i - 1].isspace()}
        self._tails = {t[i:] for t in tokens for i in range(1, len(t)) if not t[i].isspace()}

    def occurs_in(self, text: str) -> bool:
        """Whether a special token stands in `text`. Quick where none does."""
        return any(b in text for b in self._beginnings) and self.pattern.search(text) is not None

    def needs_protection(self, value: Any) -> bool:
        """Whether a string in `value` may hold a special token or marker, or a part of a token at an end. Fast."""
        if isinstance(value, str):
            for needle in self._needles:  # a loop, because this runs on every string of the input
                if needle in value:
                    return True
            return not (self._firsts.isdisjoint(value[-self._longest :])
                        and self._lasts.isdisjoint(value[: self._longest]))
        if isinstance(value, dict):
            return self.needs_protection([*value, *value.values()])
        return isinstance(value, (list, tuple)) and any(map(self.needs_protection, value))

    def protect(self, value: Any, table: dict[str, str]) -> Any:
        """`value` with markers for the special tokens in its strings; `table` maps token to marker.

        Where a string begins or ends with a part of a special token, which the template's text could complete, a marker
        stands for its outermost character. Roles keep their ends: templates make tokens like <|user|> of them.
        """
        return self._protect(value, table, ends=True)

    def _protect(self, value: Any, table: dict[str, str], *, ends: bool) -> Any:
        if isinstance(value, str):

            def mark(token: str) -> str:
                return table.setdefault(token, chr(_FIRST + len(table)))

            value = self._unsafe.sub(lambda match: mark(match.group()), value)
            if ends and value:
                most = min(self._longest, len(value) + 1)
                if any(value[-n:] in self._heads for n in range(1, most)):
                    value = value[:-1] + mark(value[-1])
                if any(value[:n] in self._tails for n in range(1, most)):
                    value = mark(value[0]) + value[1:]
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self._protect(v, table, ends=ends) for v in value)
        if isinstance(value, dict):
            return {self._protect(k, table, ends=False): self._protect(v, table, ends=k not in ("role", "type"))
                    for k, v in value.items()}
        return value

    def restore(self, text: str, spans: list[Span], table: dict[str, str]) -> Rendered:
        """The rendered `text` with the markers in `table` turned back, and where they stood."""
        if not table:
            return Rendered(text, tuple(spans))
        originals = {marker: token for token, marker in table.items()}
        parts: list[str] = []
        literal: list[Span] = []
        shifts: list[Span] = []
        last = grown = 0
        for match in _MARKERS.finditer(text):
            original = originals[match.group()]
            parts += (text[last : match.start()], original)
            literal.append((match.start() + grown, match.start() + grown + len(original)))
            last, grown = match.end(), grown + len(original) - 1
            shifts.append((match.start(), grown))
        parts.append(text[last:])
        if not literal:
            return Rendered(text, tuple(spans))

        def moved(position: int) -> int:
            return position + max((g for at, g in shifts if at < position), default=0)

        whole = "".join(parts)
        return Rendered(whole, tuple((moved(s), moved(e)) for s, e in spans), tuple(self._real(whole, literal)))

    def _real(self, text: str, literal: list[Span]) -> list[Span]:
        """The `literal` spans, if a special token of the unchanged `text` overlaps one of them; else none."""
        tokens = [match.span() for match in self.pattern.finditer(text)]
        # A token at one place can hide another that overlaps it, so all are kept where one is real.
        return literal if any(s < end and start < e for s, e in literal for start, end in tokens) else []

    def guard(self, item: Rendered) -> tuple[str, list[Span]]:
        """`item` for the guarded tokenizer: the template's special tokens as markers, users' text unchanged.

        Returns the text and its trained spans. Raises RowProblem.
        """
        if _GUARDS.search(item.text):
            what = f"the text holds {item.text[slice(*item.literal[0])]!r} beside private characters of plane 16"
            raise RowProblem("special_in_text", f"{what}, which stand for special tokens",
                             fix="remove special tokens from the texts")
        parts: list[str] = []
        cuts: list[Span] = []  # (position behind a token in the text, how much shorter the guarded text is from there)
        last = shrunk = 0
        gaps = zip([0, *(e for _, e in item.literal)], [*(s for s, _ in item.literal), len(item.text)], strict=True)
        for begin, end in gaps:
            for match in self.pattern.finditer(item.text, begin, end):
                parts += (item.text[last : match.start()], self.guards[match.group()])
                last = match.end()
                shrunk += len(match.group()) - 1
                cuts.append((last, shrunk))
        parts.append(item.text[last:])

        def moved(position: int) -> int:
            return position - max((gone for behind, gone in cuts if behind <= position), default=0)

        return "".join(parts), [(moved(s), moved(e)) for s, e in item.trained]
