"""Conversations -> token ids and loss masks.

All boundaries are found in the *rendered text* (characters) and carried to tokens by the offsets of one tokenisation,
so a token that straddles a boundary is trained and no answer token is lost to a merge. A sample ends on exactly one
end-of-turn token. Special tokens in users' own text are encoded as text (special.py): only the template can open or
close a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from mrlhf.data.prepare.complete import Shape
from mrlhf.data.prepare.formats import Conversation, Message
from mrlhf.data.prepare.render import ChatTemplate
from mrlhf.data.tokenizers.encoder import Encoder, trained_mask
from mrlhf.data.tokenizers.special import Rendered, Span, SpecialTokens
from mrlhf.data.tokenizers.vocabulary import load_tokenizer, tokenizer_fingerprint, vocab_size
from mrlhf.errors import ConfigError, DataError, RowProblem

__all__ = ["Rendered", "Template", "load_tokenizer", "tokenizer_fingerprint", "trained_mask", "vocab_size"]

_LIKE_SPECIAL = re.compile(r"<\|[\w.:-]{1,40}\|>|<\w{1,20}_of_\w{1,20}>")
_PROBE = [{"role": "user", "content": "a0b1"}, {"role": "assistant", "content": "c2d3"}]
_CALLS = [{"id": "call00001", "type": "function", "function": {"name": "e4f5", "arguments": arguments}}
          for arguments in ({"g6": "h7"}, '{"g6": "h7"}')]
_SHAPES = 10_000  # kept, most
_MARKED_FIX = "--chat-template FILE with {% generation %} ... {% endgeneration %} around the assistant's turns"


class Template:
    """Renders and tokenises conversations for one tokenizer. Can be pickled.

    chat_template   Jinja text; None: the tokenizer's own
    input_template  plain text with {} for the prompt, instead of a chat template
    loss_on         "last": train the last turn of the assistant; "all": every one
    append_eos      add the end token where the template renders none (and to plain and pretraining text)
    parse_special   read special tokens in users' text as special tokens, instead of as text
    encoder         encodes the texts (choose_encoder); None: HF's tokenizer

    `end_token`/`end_token_id`: the token that closes the assistant's turn; None where there is none. Raises ConfigError
    or DataError when the template cannot work at all; the methods raise RowProblem for a conversation it refuses.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None, input_template: str | None = None,
                 loss_on: str = "last", append_eos: bool = True, parse_special: bool = False,
                 encoder: Encoder | None = None):
        if not tokenizer.is_fast:
            what = f"{type(tokenizer).__name__} is a slow tokenizer"
            raise DataError(
                f"{what}: it reports no character offsets, which the loss masks are made from",
                where=tokenizer.name_or_path, expected="a fast tokenizer (tokenizer.json)",
                fix="convert it: AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW) with a recent transformers"
            )
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.encoder = encoder if encoder is not None else Encoder(tokenizer)
        self.input_template, self.plain = input_template, input_template is not None
        self._plain_text = input_template or ""
        self._special = self.encoder.special
        self._users_text = SpecialTokens([]) if parse_special else self._special
        self._begin = _tokens_before(tokenizer)
        self.chat_template: str | None = None
        self.end_token: str | None = tokenizer.eos_token if append_eos else None
        self._append = append_eos
        if self.plain:
            self._check_plain()
        elif chat_template is None and tokenizer.chat_template is None:
            raise ConfigError("the tokenizer has no chat template", where=tokenizer.name_or_path,
                              fix='--chat-template NAME or FILE, or --input-template "User: {}\\nAssistant: "')
        else:
            self.chat_template = chat_template if chat_template is not None else tokenizer.get_chat_template()
            self._jinja = ChatTemplate(self.chat_template, tokenizer.special_tokens_map, where=tokenizer.name_or_path)
            self._probe()
        self._shapes: dict[bytes, str | None] = {}  # rendering of a shape with a problem; None: nothing is left out
        self._end = self.end_token or ""
        self.end_token_id: int | None = None
        if self.end_token is not None:
            self.end_token_id = tokenizer.convert_tokens_to_ids(self.end_token)

    def _check_plain(self) -> None:
        if self._plain_text.count("{}") != 1:
            raise ConfigError(f"--input-template {self.input_template!r} must hold {{}} once",
                              expected='like "User: {}\\nAssistant: "')
        if self._append and self.tokenizer.eos_token is None:
            raise DataError("the tokenizer has no eos token", where=self.tokenizer.name_or_path,
                            fix="set eos_token there, or --no-append-eos")

    # ---- rendering -------------------------------------------------------------------------------

    def conversation(self, conversation: Conversation, *, tools: list[Any] | None = None) -> Rendered:
        """The conversation (messages; plain template: prompt and answer), cut after the last end-of-turn token."""
        self._check_tools(tools)
        if isinstance(conversation, list):
            conversation = self._with_content(conversation)
        table: dict[str, str] = {}
        if self._users_text.needs_protection((conversation, tools)):
            conversation, tools = self._users_text.protect((conversation, tools), table)
        if isinstance(conversation, tuple):
            prompt, answer = conversation
            before = self._plain_text.replace("{}", prompt)
            text = before + answer + (self._end if self._append else "")
            return self._users_text.restore(text, [(len(before), len(text))], table)
        text, spans = self._closed(conversation, tools)
        self._require_all(text, conversation, tools)
        for start, end in spans:
            if not text[start:end].removesuffix(self._end).strip():
                raise RowProblem("empty_answer", "the chat template leaves nothing of the answer but its end token",
                                 expected="an answer that it renders", fix="--chat-template FILE")
        return self._users_text.restore(text, spans, table)

    def _closed(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The rendered text up to the end of the last trained turn, and the trained spans."""
        text, spans = self._jinja.render(messages, tools=tools)
        return self._close_marked(text, spans) if self._jinja.marked else self._close_turns(text, messages, tools)

    def prompt(self, prompt: list[Message] | str, *, tools: list[Any] | None = None) -> Rendered:
        """A prompt up to where the answer begins (with the template's generation prompt); nothing in it is trained."""
        self._check_tools(tools)
        table: dict[str, str] = {}
        if isinstance(prompt, str) and not self.plain:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            prompt = self._with_content(prompt)
        if self._users_text.needs_protection((prompt, tools)):
            prompt, tools = self._users_text.protect((prompt, tools), table)
        if isinstance(prompt, str):
            text = self._plain_text.replace("{}", prompt)
        else:
            text, _ = self._jinja.render(prompt, tools=tools, add_generation_prompt=True)
            self._require_all(text, prompt, tools, is_prompt=True)
        return self._users_text.restore(text, [], table)

    def render_prompt(self, messages: list[Message] | str, *, tools: list[Any] | None = None) -> list[int]:
        """Token ids of a prompt, as the model will see it before it answers."""
        return self.encode([self.prompt(messages, tools=tools)])[0][0].tolist()

    def _check_tools(self, tools: list[Any] | None) -> None:
        if tools and self.plain:
            raise RowProblem("tools_ignored", "the row has tools, which the template would leave out",
                             expected="a chat template that renders `tools`",
                             fix="--chat-template FILE instead of --input-template, or remove the column")

    @cached_property
    def _renders_null(self) -> bool:
        """Whether the template renders a tool call whose content is null, and not the word None for the content."""
        for call in _CALLS:
            try:
                text, _ = self._jinja.render([_PROBE[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
            except RowProblem:
                continue
            return "e4f5" in text and "None" not in text
        return False

    def _with_content(self, messages: list[Message]) -> list[Message]:
        """The messages with an empty content in the place of null, unless the template expects null."""
        if all(message.get("content", "") is not None for message in messages) or self._renders_null:
            return messages
        return [{**m, "content": ""} if m.get("content", "") is None else m for m in messages]

    def _require_all(self, text: str, messages: list[Message], tools: list[Any] | None, *,
                     is_prompt: bool = False) -> None:
        """Raises RowProblem for a text of the record that `text`, its rendering, does not hold."""
        shape, trained = Shape(messages, tools), [] if is_prompt else self._trained_turns(messages)
        refused = False
        key = msgspec.json.encode((shape.messages, shape.tools, is_prompt))
        if key not in self._shapes:
            try:
                if is_prompt:
                    rendered, _ = self._jinja.render(shape.messages, tools=shape.tools, add_generation_prompt=True)
                else:
                    rendered, _ = self._closed(shape.messages, shape.tools)
            except RowProblem:  # it looks at the texts themselves
                refused = True
            else:
                if len(self._shapes) >= _SHAPES:
                    self._shapes.clear()
                problem = shape.problem(rendered, trained=trained, source=self._jinja.source)
                self._shapes[key] = None if problem is None else rendered
        shown = self._shapes.get(key)
        problem = None if shown is None else shape.problem(shown, trained=trained, source=self._jinja.source)
        problem = problem or shape.differing_text(text, trained=trained, every=refused)
        if problem is not None:
            raise problem

    def _trained_turns(self, messages: list[Message]) -> list[int]:
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        return turns if self.loss_on == "all" else turns[-1:]

    def _close_marked(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """{% generation %} spans, each brought to end on its end-of-turn token; the text cut after the last."""
        if not spans:
            raise RowProblem("generation", "the chat template's {% generation %} block is not reached",
                             fix="--chat-template FILE")
        closed = []
        for i, (start, end) in enumerate(spans):
            limit = spans[i + 1][0] if i + 1 < len(spans) else len(text)
            if self.end_token is not None:
                at = text.rfind(self.end_token, start, end)
                at = at if at >= 0 else text.find(self.end_token, end, limit)
                end = at + len(self.end_token) if at >= 0 else end
            closed.append((start, end))
        return self._finish(text, closed)

    def _close_turns(self, text: str, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        spans = []
        for i in self._trained_turns(messages):
            before, _ = self._jinja.render(messages[:i], tools=tools, add_generation_prompt=True)
            if not text.startswith(before):
                what = f"the chat template renders the turns before message {i} differently once it follows"
                raise RowProblem("template_prefix", f"{what}, so its start is unknown",
                                 expected="a template whose prompt is the beginning of the conversation",
                                 fix=_MARKED_FIX)
            spans.append((len(before), self._turn_end(text, len(before), messages[i])))
        return self._finish(text, spans)

    def _turn_end(self, text: str, start: int, message: Message) -> int:
        """The place behind the first end token after the content, or behind the content where there is no end token."""
        content = message.get("content")
        content_at, behind = -1, start
        if isinstance(content, str) and not message.get("tool_calls"):
            stripped = content.strip()  # a template may trim the content or not, but renders this part
            content_at = text.find(stripped, start)
            if content_at >= 0:
                whole = content_at - (len(content) - len(content.lstrip()))
                untrimmed = whole >= start and text.startswith(content, whole)
                behind = whole + len(content) if untrimmed else content_at + len(stripped)
        end_token_at = -1 if self.end_token is None else text.find(self.end_token, behind)
        if end_token_at >= 0:
            return end_token_at + len(self._end)
        if content_at < 0:
            what = "the chat template changes the answer and renders no end token behind it, so its end is unknown"
            raise RowProblem("turn_end", what, fix=_MARKED_FIX)
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
            text, _ = self._jinja.render(_PROBE)
            with_prompt, _ = self._jinja.render(_PROBE[:1], add_generation_prompt=True)
            without, _ = self._jinja.render(_PROBE[:1])
        except RowProblem as error:
            raise DataError(f"{error.what} (a user's and an assistant's message)", where=where,
                            fix="--chat-template FILE") from error
        at = text.find("c2d3")
        if at < 0 or "a0b1" not in text:
            raise DataError("the chat template leaves out messages", where=where, fix="--chat-template FILE")
        closing = self._special.pattern.search(text, at + 4)
        unknown = _LIKE_SPECIAL.search(text, at + 4, closing.start() if closing else len(text))
        if unknown:
            raise DataError(
                f"the chat template closes turns with {unknown.group()!r}, "
                "which is no special token of this tokenizer: it would be encoded as ordinary text",
                where=where,
                fix="--chat-template NAME or FILE, or add it with tokenizer.add_special_tokens "
                "and resize the model's embeddings",
            )
        if closing:
            self.end_token, self._append = closing.group(), True
        elif self._append and self.end_token is None:
            raise DataError("neither the chat template nor the tokenizer has an end token", where=where,
                            fix="set eos_token in the tokenizer's configuration")
        ignores_prompt = not self._jinja.marked and with_prompt == without and text.startswith(without)
        if ignores_prompt and (header := text[len(without) : at]).strip():
            raise DataError(
                f"the chat template ignores add_generation_prompt: {header!r} would be trained as part of the answer",
                where=where, expected="{% if add_generation_prompt %} at the template's end",
                fix=f"mend the template, or {_MARKED_FIX}"
            )

    # ---- tokenising ------------------------------------------------------------------------------

    def encode(self, items: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [T], mask uint8 [T]) of each item. Plain text gets the tokenizer's bos, chat text does not."""
        begin = np.asarray(self._begin if self.plain else [], dtype=np.int32)
        results: list[Any] = [None] * len(items)
        for guarded in (False, True):
            chosen = [i for i, item in enumerate(items) if bool(item.literal) == guarded]
            if not chosen:
                continue
            if guarded:
                texts, spans = zip(*(self._guard(items[i]) for i in chosen), strict=True)
            else:
                texts, spans = zip(*((items[i].text, items[i].trained) for i in chosen), strict=True)
            for i, (ids, mask) in zip(chosen, self.encoder.masked(texts, spans, guarded=guarded), strict=True):
                if len(begin):
                    ids, mask = np.concatenate([begin, ids]), np.concatenate([np.zeros(len(begin), np.uint8), mask])
                results[i] = ids, mask
        return results

    def encode_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Pretraining documents: ids int32 [T], the tokenizer's bos where it has one and, with `append_eos`, its eos.

        For a Template with a plain `input_template` ("{}"), whose end token is eos.
        """
        begin = np.asarray(self._begin, dtype=np.int32)
        end = np.asarray([] if self.end_token_id is None else [self.end_token_id], dtype=np.int32)
        results: list[Any] = [None] * len(texts)
        literal = [self._users_text.occurs_in(text) for text in texts]
        for guarded in (False, True):
            chosen = [i for i, is_literal in enumerate(literal) if is_literal == guarded]
            if guarded:
                own = [self._guard(Rendered(texts[i], literal=((0, len(texts[i])),)))[0] for i in chosen]
            else:
                own = [texts[i] for i in chosen]
            for i, ids in zip(chosen, self.encoder.ids(own, guarded=guarded) if own else (), strict=True):
                results[i] = np.concatenate([begin, ids, end])
        return results

    def _guard(self, item: Rendered) -> tuple[str, list[Span]]:
        if not self.encoder.guards_exactly:
            what = f"the text holds {item.text[slice(*item.literal[0])]!r}"
            raise RowProblem("special_in_text", f"{what}, which this tokenizer cannot encode as plain text",
                             fix="remove special tokens from the texts")
        return self._special.guard(item)


def plain_template(text: str) -> str:
    """An input template with the line breaks and tabs that a shell hands over as a backslash and a letter."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _tokens_before(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text (bos). Our end token replaces those that it puts behind one."""
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]
