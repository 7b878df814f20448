"""Finds what a chat template leaves out of a record, or renders as Python's repr, None or JSON in a JSON string.

A text may stand in the rendering by chance: the city of a tool call also in the user's question. So the template also
renders the record's *shape*: the same roles, keys and tags, with a mark of its own in the place of every text. Whatever
mark is missing there, the template leaves out at that place. Most records share few shapes, so that this costs little.
Templates that look at a text, as for `<think>`, see the same tags in the shape.

What may be left out: the reasoning of turns that are not trained (Qwen3, DeepSeek and others drop it on purpose),
and keys of a message other than content, reasoning, and tool calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mrlhf.data.prepare.formats import REASONING_KEYS, Message
from mrlhf.errors import RowProblem

# Templates cut texts at these, or take them out; the text between them stays as it is.
_REASONING = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
_TAG = re.compile(rf"(</?{_REASONING}>|</?tool_(?:call|response)>|\[/?THINK\]|/no_think|/think)")
_IN_TAGS = ("hink", "HINK", "thought", "reasoning", "tool_")  # one of them stands in each tag
_CLOSES_REASONING = re.compile(rf"</{_REASONING}>|\[/THINK\]")
# A mark inside Python's form of a dict or a list; a list behind "=" is an argument of a call in Python's own syntax.
_REPR = re.compile(r"'[^'\n]*': \[?'?zq\d+qz|\{'zq\d+qz|(?<!=)\['zq\d+qz")
_ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")  # names of a call's arguments in data
_MARK = re.compile(r"zq\d+qz")


class Piece(NamedTuple):
    """A text of the record. `mark` stands for it in the shape. kind: "turn", "reasoning", "tool_calls", "tools" or
    "nothing" (need not stand)."""

    mark: str
    text: str
    kind: str
    turn: int  # of the message; -1 for tools
    role: str = ""


class Shape:
    """A copy of a conversation and its tools in which marks stand for the texts, and these `pieces`."""

    def __init__(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        self.pieces: list[Piece] = []
        self.messages = [self._message(message, i) for i, message in enumerate(messages)]
        self.tools = [self._function(tool, "tools", -1, ()) for tool in tools] if tools else tools

    def _mark(self, text: str, kind: str, turn: int, role: str = "") -> str:
        self.pieces.append(Piece(f"zq{len(self.pieces)}qz", text, kind, turn, role))
        return self.pieces[-1].mark

    def _message(self, message: Message, i: int) -> Message:
        copy, reasoning = dict(message), {}
        if isinstance(message.get("content"), str):
            copy["content"] = self._content(message["content"], i, message["role"])
        for key, value in message.items() if message.keys() - {"role", "content"} else ():
            if key in REASONING_KEYS and isinstance(value, str) and value.strip():
                if value not in reasoning:  # the same text under two keys needs to stand once
                    reasoning[value] = self._mark(value.strip(), "reasoning", i)
                copy[key] = reasoning[value]
            elif key == "tool_calls" and isinstance(value, list):
                copy[key] = [self._function(call, "tool_calls", i, _ARGUMENTS) for call in value]
            elif key == "function_call":
                copy[key] = self._function(value, "tool_calls", i, _ARGUMENTS)
        return copy

    def _content(self, text: str, i: int, role: str) -> str:
        """The text with a mark for each part between tags; what a closing tag of reasoning ends is reasoning."""
        parts = _TAG.split(text) if any(word in text for word in _IN_TAGS) else [text]
        for at in range(0, len(parts), 2):
            core = parts[at].strip()
            if core:
                is_reasoning = at + 1 < len(parts) and _CLOSES_REASONING.fullmatch(parts[at + 1]) is not None
                mark = self._mark(core, "reasoning" if is_reasoning else "turn", i, role)
                parts[at] = mark if core == parts[at] else parts[at].replace(core, mark, 1)
        return "".join(parts)

    def _function(self, value: Any, kind: str, i: int, also: tuple[str, ...]) -> Any:
        """A tool or a call, {"function": {...}} or the function itself, with marks for its name and the keys `also`."""
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("function"), dict):
            return {**value, "function": self._function(value["function"], kind, i, also)}
        copy = dict(value)
        if isinstance(copy.get("name"), str) and copy["name"]:
            copy["name"] = self._mark(copy["name"], kind, i)
        elif kind == "tools":  # one that its provider runs, like {"type": "web_search"}
            return self._arguments(copy, kind, i)
        for key in also:
            if key in copy:
                copy[key] = self._arguments(copy[key], kind, i)
        return copy

    def _arguments(self, value: Any, kind: str, i: int) -> Any:
        """`value` with a mark for every text and number, and for the key of what has none, like true.

        A JSON string of an object stays one.
        """
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                inner = json.loads(value) or {self._mark(value, "nothing", i): ""}
                return json.dumps(self._arguments(inner, kind, i), ensure_ascii=False)
            except (ValueError, RecursionError):
                pass  # ordinary text
        if isinstance(value, dict):
            return dict(self._argument(key, inner, kind, i) for key, inner in value.items())
        if isinstance(value, list):
            return [self._arguments(inner, kind, i) for inner in value]
        if isinstance(value, bool) or value is None or not value and isinstance(value, str):
            return value
        return self._mark(value.strip() if isinstance(value, str) else json.dumps(value), kind, i)

    def _argument(self, key: str, value: Any, kind: str, i: int) -> tuple[str, Any]:
        before = len(self.pieces)
        copy = self._arguments(value, kind, i)
        return self._mark(key, kind, i) if len(self.pieces) == before and not _MARK.fullmatch(key) else key, copy

    def problem(self, rendered: str, *, trained: Sequence[int], source: str) -> RowProblem | None:
        """What is wrong with the shape's rendering. `trained`: turns whose reasoning must stand; `source`: template."""
        standing = set(_MARK.findall(rendered))
        gone = [piece for piece in self.pieces if piece.mark not in standing]
        problem = _left_out(gone, trained)
        if problem is not None:
            return problem
        parts = _REPR.findall(rendered)
        shown = parts or [text for text in _reprs(self.tools) if text in rendered]
        if shown:  # where it renders the whole call so, names too, or a tool, arguments as strings would not help
            helps = parts and not any(part.startswith("'name'") for part in parts)
            strings = ", or arguments as JSON strings" if helps else ""
            return RowProblem("python_repr", f"the chat template renders a Python object, like {shown[0][:60]}...",
                              expected="JSON or text", fix=f"--chat-template FILE (its filter tojson){strings}")
        if any(f'\\"{piece.mark}' in rendered for piece in self.pieces
               if piece.kind in ("tool_calls", "nothing")):
            return RowProblem("encoded_twice", "the chat template encodes arguments that are a JSON string once more",
                              expected="arguments as an object where the template writes JSON",
                              fix="parse the arguments in the data, or --chat-template FILE")
        own = source + json.dumps([self.messages, self.tools], default=str)
        if "None" in rendered and "None" not in own:
            return RowProblem("null_rendered", "the chat template renders the word None for something that is missing",
                              fix="mend the data, or --chat-template FILE")
        return None

    def differing_text(self, rendered: str, *, trained: Sequence[int], every: bool) -> RowProblem | None:
        """The problem of a text that the template changes or leaves out for what it says. `every`: names too."""
        gone = [piece for piece in self.pieces
                if piece.text not in rendered and (every or piece.kind in ("turn", "reasoning"))
                and not any(spelling in rendered for spelling in _in_json(piece.text))]
        return _left_out(gone, trained)


def _reprs(value: Any) -> Iterator[str]:
    """Python's forms of the dicts in `value`, at every depth, where JSON's differ."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _reprs(inner)
    if isinstance(value, dict) and (text := repr(value)).startswith("{'"):
        yield text


def _in_json(text: str) -> tuple[str, str]:
    """How a template may write a text inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _left_out(gone: Sequence[Piece], trained: Sequence[int]) -> RowProblem | None:
    """The problem of the first of `gone` that must stand."""
    for piece in gone:
        shown = repr(piece.text if len(piece.text) <= 60 else piece.text[:60] + "...")
        if piece.kind == "tools":
            return RowProblem("tools_ignored", f"the row has tools ({shown}), which the template would leave out",
                              expected="a chat template that renders `tools`",
                              fix="--chat-template FILE, or remove the column")
        if piece.kind == "nothing" or piece.kind == "reasoning" and piece.turn not in trained:
            continue
        name = {"turn": f"the turn of '{piece.role}'", "reasoning": "the reasoning of the trained turn",
                "tool_calls": "a tool call"}[piece.kind]
        what = f"the chat template leaves out {name} (message {piece.turn}): {shown}"
        return RowProblem(f"{piece.kind}_ignored", what,
                          expected="a chat template that renders every text of the record",
                          fix="--chat-template FILE, or remove it from the data")
    return None
