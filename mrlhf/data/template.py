"""Conversations -> token ids and loss masks.

All boundaries are found in the *rendered text* (characters) and carried to tokens by the offsets of one tokenisation, so a token
that straddles the boundary is trained and no answer token is lost to a merge. A sample ends on exactly one end-of-turn token.
Special tokens that stand in the users' own text are encoded as text: only the template can open or close a turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrlhf.data.formats import Conversation, Message, RowProblem
from mrlhf.errors import ConfigError, DataError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "a0b1"}, {"role": "assistant", "content": "c2d3"}]
_MARKED_FIX = "--chat-template FILE with {% generation %} ... {% endgeneration %} around the assistant's turns"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_FINGERPRINT_PROBE = "The quick brown fox, 1234567 times:\n\tdéjà vu 東京 🙂  <s></s><|im_start|> don't  \n\n  x = [1.5e-3];"


def load_tokenizer(path: str) -> Any:
    """The HF tokenizer in directory `path` (or hub id). Never runs code from it. Raises DataError."""
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise DataError("no such directory", where=path, expected="a directory with tokenizer.json", fix="--tokenizer DIR")
    if os.path.isdir(path) and not any(f in _VOCABULARIES or f.endswith((".model", ".tiktoken")) for f in os.listdir(path)):
        # transformers would make up an empty tokenizer from the model's type
        raise DataError("no tokenizer files", where=path, expected="a directory with tokenizer.json", fix="copy the model's tokenizer there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load a tokenizer: {reason}", where=path, expected="a directory with tokenizer.json", fix="--tokenizer DIR"
        ) from error
    tokenizer.model_max_length = 1 << 60  # lengths are checked against --seq-length; HF's own warning would only repeat for every sample
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """Smallest size that covers every id (ids of added tokens may leave gaps)."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_fingerprint(tokenizer: str | Any) -> str:
    """SHA-256 over what decides the ids: vocabulary, merges, added tokens, bos/eos and the ids of a probe text.

    Takes a directory or a loaded tokenizer. Saving and loading again keeps it; the chat template, the padding token and the
    files' layout do not enter.
    """
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    merges: list[Any] = []
    if loaded.is_fast:
        merges = json.loads(loaded.backend_tokenizer.to_str())["model"].get("merges") or []
    parts = {
        "vocab": sorted(loaded.get_vocab().items()),
        "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "added": sorted((i, t.content, bool(t.special)) for i, t in loaded.added_tokens_decoder.items()),
        "ends": [loaded.bos_token, loaded.eos_token],
        "probe": loaded(_FINGERPRINT_PROBE, add_special_tokens=False)["input_ids"],
    }
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Rendered:
    """`text` with the character spans [start, end) that are trained and those that hold users' text looking like special tokens."""

    text: str
    trained: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()


class Template:
    """Renders and tokenises conversations for one tokenizer.

    chat_template   Jinja text; None: the tokenizer's own
    input_template  plain text with {} for the prompt, instead of a chat template
    loss_on         "last": train the last turn of the assistant; "all": every one
    append_eos      add the end token where the template renders none (and to plain and pretraining text)

    `end_token`/`end_token_id`: what closes the assistant's turn; None where nothing does. Raises ConfigError or DataError when the
    template cannot work at all, RowProblem (from the methods) for a conversation it refuses.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        input_template: str | None = None,
        loss_on: str = "last",
        append_eos: bool = True,
    ):
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer: it reports no character offsets, which the loss masks are made from",
                where=tokenizer.name_or_path,
                expected="a fast tokenizer (tokenizer.json)",
                fix="convert it: AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW) with a recent transformers",
            )
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.input_template, self.plain = input_template, input_template is not None
        self._plain_text = input_template or ""
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        alternatives = "|".join(re.escape(t) for t in sorted(special, key=len, reverse=True))
        self._special = re.compile(alternatives or r"(?!)")
        # Markers stand for special tokens in users' text while rendering; private-use characters that are really there become markers too.
        self._unsafe = re.compile(f"{alternatives}|[\U000f0000-\U000ffffd]" if alternatives else "(?!)")
        self._marker = re.compile("[\U000f0000-\U000ffffd]")
        with_special, bare = self._ids("a", add_special_tokens=True), self._ids("a")
        start = next((i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare), 0)
        self._begin = with_special[:start]  # what the tokenizer puts before a text (bos); what it puts behind is replaced by our end token

        self.chat_template: str | None = None
        self.end_token: str | None = tokenizer.eos_token if append_eos else None
        self._append = append_eos
        if self.plain:
            if self._plain_text.count("{}") != 1:
                raise ConfigError(f"--input-template {input_template!r} must hold {{}} once", expected='like "User: {}\\nAssistant: "')
            if append_eos and tokenizer.eos_token is None:
                raise DataError(
                    "the tokenizer has no eos token", where=tokenizer.name_or_path, fix="set eos_token there, or --no-append-eos"
                )
        elif chat_template is None and tokenizer.chat_template is None:
            raise ConfigError(
                "the tokenizer has no chat template",
                where=tokenizer.name_or_path,
                fix='--chat-template FILE, or --input-template "User: {}\\nAssistant: "',
            )
        else:
            self.chat_template = chat_template if chat_template is not None else tokenizer.get_chat_template()
            self._marked = bool(_GENERATION.search(self.chat_template))
            self._probe()
        self._end = self.end_token or ""
        self.end_token_id: int | None = None if self.end_token is None else tokenizer.convert_tokens_to_ids(self.end_token)
        self._splits_exactly = self._check_pieces()

    # ---- rendering -------------------------------------------------------------------------------------------------------------

    def conversation(self, conversation: Conversation) -> Rendered:
        """The whole conversation, cut after the last end-of-turn token. Takes messages, or (prompt, answer) with a plain template."""
        table: dict[str, str] = {}
        if isinstance(conversation, tuple):
            prompt, answer = (self._protect(part, table) for part in conversation)
            before = self._plain_text.replace("{}", prompt)
            text = before + answer + (self._end if self._append else "")
            return self._restore(text, [(len(before), len(text))], table)
        messages = self._protect(conversation, table)
        if self._marked:
            text, spans = self._render(messages, spans=True)
            text, spans = self._close_marked(text, spans)
        else:
            text, _ = self._render(messages)
            text, spans = self._close_turns(text, messages)
        return self._restore(text, spans, table)

    def prompt(self, prompt: list[Message] | str) -> Rendered:
        """A prompt up to where the answer begins (with the template's generation prompt); nothing in it is trained."""
        table: dict[str, str] = {}
        if isinstance(prompt, str) and not self.plain:
            prompt = [{"role": "user", "content": prompt}]
        protected = self._protect(prompt, table)
        if isinstance(protected, str):
            text = self._plain_text.replace("{}", protected)
        else:
            text, _ = self._render(protected, add_generation_prompt=True)
        return self._restore(text, [], table)

    def render_prompt(self, messages: list[Message] | str) -> list[int]:
        """Token ids of a prompt, as the model will see it before it answers."""
        return self.encode([self.prompt(messages)])[0][0].tolist()

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False, spans: bool = False) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                [messages],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=spans,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise RowProblem(
                "template",
                f"the chat template refuses this conversation: {error}",
                expected=f"roles and order the template knows; here {[m['role'] for m in messages][:8]}",
                fix="--chat-template FILE",
            ) from error
        return texts[0], [tuple(m) for m in marks[0]] if spans else []

    def _close_marked(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """{% generation %} spans, each brought to end on its end-of-turn token; the text cut after the last."""
        if not spans:
            raise RowProblem("generation", "the chat template's {% generation %} block is not reached", fix="--chat-template FILE")
        closed = []
        for i, (start, end) in enumerate(spans):
            limit = spans[i + 1][0] if i + 1 < len(spans) else len(text)
            if self.end_token is not None:
                at = text.rfind(self.end_token, start, end)
                at = at if at >= 0 else text.find(self.end_token, end, limit)
                end = at + len(self.end_token) if at >= 0 else end
            closed.append((start, end))
        return self._finish(text, closed)

    def _close_turns(self, text: str, messages: list[Message]) -> tuple[str, list[Span]]:
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        spans = []
        for i in turns if self.loss_on == "all" else turns[-1:]:
            before, _ = self._render(messages[:i], add_generation_prompt=True)
            if not text.startswith(before):
                raise RowProblem(
                    "template_prefix",
                    f"the chat template renders the turns before message {i} differently once it follows, so its start is unknown",
                    expected="a template whose prompt is the beginning of the conversation",
                    fix=_MARKED_FIX,
                )
            spans.append((len(before), self._turn_end(text, len(before), messages[i])))
        return self._finish(text, spans)

    def _turn_end(self, text: str, start: int, message: Message) -> int:
        """Behind the first end token that follows the message's content, or behind the content where the template renders none."""
        content = message.get("content")
        found, behind = -1, start
        if isinstance(content, str) and not message.get("tool_calls"):
            for form in (content, content.strip()):
                found = text.find(form, start)
                if found >= 0:
                    behind = found + len(form)
                    break
        at = -1 if self.end_token is None else text.find(self.end_token, behind)
        if at >= 0:
            return at + len(self._end)
        if found < 0:
            raise RowProblem(
                "turn_end",
                "the chat template changes the answer and renders no end token behind it, so its end is unknown",
                fix=_MARKED_FIX,
            )
        return behind

    def _finish(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        start, end = spans[-1]
        text = text[:end]
        if self._append and not text.endswith(self._end):
            text += self._end
        spans[-1] = (start, len(text))
        return text, spans if self.loss_on == "all" else spans[-1:]

    def _probe(self) -> None:
        """Learn the end-of-turn token from a two-message conversation and refuse templates that cannot be used."""
        where = self.tokenizer.name_or_path
        try:
            text, _ = self._render(_PROBE)
            with_prompt, _ = self._render(_PROBE[:1], add_generation_prompt=True)
            without, _ = self._render(_PROBE[:1])
        except RowProblem as error:
            raise DataError(f"{error.what} (a user's and an assistant's message)", where=where, fix="--chat-template FILE") from error
        at = text.find("c2d3")
        if at < 0 or "a0b1" not in text:
            raise DataError("the chat template leaves out messages", where=where, fix="--chat-template FILE")
        closing = self._special.search(text, at + 4)
        if closing:
            self.end_token, self._append = closing.group(), True
        elif self._append and self.end_token is None:
            raise DataError(
                "neither the chat template nor the tokenizer has an end token",
                where=where,
                fix="set eos_token in the tokenizer's configuration",
            )
        if not self._marked and with_prompt == without and text.startswith(without) and text[len(without) : at].strip():
            raise DataError(
                f"the chat template ignores add_generation_prompt: {text[len(without) : at]!r} would be trained as part of the answer",
                where=where,
                expected="{% if add_generation_prompt %} at the template's end",
                fix=f"mend the template, or {_MARKED_FIX}",
            )

    # ---- users' text that looks like special tokens ----------------------------------------------------------------------------

    def _protect(self, value: Any, table: dict[str, str]) -> Any:
        """`value` with every special token in its strings replaced by a one-character marker; `table` maps token to marker."""
        if isinstance(value, str):

            def mark(found: re.Match[str]) -> str:
                return table.setdefault(found.group(), chr(0xF0000 + len(table)))

            return self._unsafe.sub(mark, value)
        if isinstance(value, list):
            return [self._protect(v, table) for v in value]
        if isinstance(value, dict):
            return {k: v if k == "role" else self._protect(v, table) for k, v in value.items()}
        return value

    def _restore(self, text: str, spans: list[Span], table: dict[str, str]) -> Rendered:
        if not table:
            return Rendered(text, tuple(spans))
        originals = {marker: token for token, marker in table.items()}
        parts: list[str] = []
        literal: list[Span] = []
        shifts: list[Span] = []
        last = grown = 0
        for found in self._marker.finditer(text):
            original = originals[found.group()]
            parts += (text[last : found.start()], original)
            if self._special.fullmatch(original):
                literal.append((found.start() + grown, found.start() + grown + len(original)))
            last, grown = found.end(), grown + len(original) - 1
            shifts.append((found.start(), grown))
        parts.append(text[last:])

        def moved(position: int) -> int:
            return position + max((g for at, g in shifts if at < position), default=0)

        return Rendered("".join(parts), tuple((moved(s), moved(e)) for s, e in spans), tuple(literal))

    def _in_pieces(self, item: Rendered) -> tuple[list[int], list[Span]]:
        """Tokenise between the template's special tokens, with those in users' text taken as plain text."""
        if not self._splits_exactly:
            raise RowProblem(
                "special_in_text",
                f"the text holds {item.text[slice(*item.literal[0])]!r}, which this tokenizer cannot encode as plain text",
                fix="remove special tokens from the texts",
            )
        ids: list[int] = []
        offsets: list[Span] = []

        def text_piece(start: int, end: int) -> None:
            if start < end:
                found = self.tokenizer(
                    item.text[start:end], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
                )
                ids.extend(found["input_ids"])
                offsets.extend((s + start, e + start) for s, e in found["offset_mapping"])

        last = 0
        for match in self._special.finditer(item.text):
            if any(s < match.end() and match.start() < e for s, e in item.literal):
                continue
            text_piece(last, match.start())
            ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
            offsets.append(match.span())
            last = match.end()
        text_piece(last, len(item.text))
        return ids, offsets

    def _check_pieces(self) -> bool:
        self._splits_exactly = True
        token = self.end_token or next(iter(self.tokenizer.all_special_tokens), None)
        if token is None or not self._special.fullmatch(token):
            return False
        text = f"{token}user\nHello there{token}\nWhy, yes{token}"
        return self._in_pieces(Rendered(text))[0] == self._ids(text)

    # ---- tokenising ------------------------------------------------------------------------------------------------------------

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def encode(self, items: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(ids int32 [T], mask uint8 [T])] of each item; plain text gets the tokenizer's bos where it has one, chat text never."""
        ordinary = [item.text for item in items if not item.literal]
        batch: Any = {"input_ids": [], "offset_mapping": []}
        if ordinary:
            batch = self.tokenizer(
                ordinary, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, return_token_type_ids=False
            )
        encoded = iter(zip(batch["input_ids"], batch["offset_mapping"], strict=True))
        begin = self._begin if self.plain else []
        results = []
        for item in items:
            ids, offsets = self._in_pieces(item) if item.literal else next(encoded)
            mask = np.concatenate([np.zeros(len(begin), np.uint8), trained_mask(offsets, item.trained)])
            results.append((np.asarray([*begin, *ids], dtype=np.int32), mask))
        return results

    def encode_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Pretraining documents: ids int32 [T], the tokenizer's bos where it has one and, with `append_eos`, its eos.

        For a Template with a plain `input_template` ("{}"), whose end token is eos.
        """
        end = [] if self.end_token_id is None else [self.end_token_id]
        batch = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return [np.asarray([*self._begin, *ids, *end], dtype=np.int32) for ids in batch]


def trained_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """uint8 [T]: 1 where a token covers at least one character of a span.

    Byte-level tokenizers leave leading blanks out of a token's offsets; the end of the token before tells where it really begins.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    if not len(offsets) or not spans:
        return mask.astype(np.uint8)
    pairs = np.asarray(offsets, dtype=np.int64)
    end = np.maximum.accumulate(pairs[:, 1])
    begin = np.minimum(pairs[:, 0], np.concatenate([[0], end[:-1]]))
    point = begin == pairs[:, 1]  # covers no character at all: belongs to what follows
    for start, stop in spans:
        mask |= np.where(point, begin >= start, pairs[:, 1] > start) & (begin < stop)
    return mask.astype(np.uint8)


def show_trained(tokenizer: Any, ids: np.ndarray, mask: np.ndarray | None, *, limit: int = 1200) -> str:
    """The decoded sample with its trained parts in [[brackets]]; the middle is left out beyond `limit` characters."""
    mask = np.zeros(len(ids), np.uint8) if mask is None else mask
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    parts = []
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        text = tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"[[{text}]]" if start < end and mask[start] else text)
    text = "".join(parts)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... ({len(text) - limit:,} characters) ... {text[-(limit // 2) :]}"
