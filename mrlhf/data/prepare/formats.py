"""One input record -> one normalised sample, for every form in the table below; anything else is a RowProblem.

    pretrain    text
    sft         messages  |  input + output (strings, or a list of messages and the list of the final assistant message)
    preference  prompt + chosen + rejected  |  chosen + rejected (conversations that differ in the last message only);
                margin optional
    prompts     prompt (list of messages ending in a user turn, or string)  |  input; label optional

A normalised conversation is a list of {"role", "content"} messages; with a plain input template it is the pair
(prompt, answer) of strings. Text parts of a content are joined, an empty system turn is absent, and nulls inside
messages and tools, which parquet and `datasets` add to make rows alike, are left out. Whatever else of a record would
get lost is a RowProblem.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mrlhf.errors import RowProblem

# Keys of a message, beside its content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
# Columns and keys of messages that hold content which no form uses.
_CONTENT_COLUMNS = ("system", "system_prompt", "history", "documents", "functions")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
Message = dict[str, Any]
Conversation = list[Message] | tuple[str, str]

# What data sets on the hub call a column of each role. A fix offers a column by its name only: a column of the right
# type and another meaning (a source, an id, the worse answer) would make wrong data.
_QUESTIONS = "prompt input question query instruction problem request context q"
_CONVERSATIONS = ("messages", "conversation", "conversations", "chat", "dialog", "dialogue")
_SYNONYMS = {
    "text": "text content document body raw_content article passage",
    "input": _QUESTIONS,
    "output": "output answer response completion reply target solution generation a",
    "prompt": f"{_QUESTIONS} prompt_messages messages",
    "chosen": "chosen better winner preferred positive accepted good",
    "rejected": "rejected worse loser dispreferred negative bad",
    "label": "label answer ground_truth solution target reference",
}


_TOOLS_EXPECTED = "a list of objects, or one as a JSON string"
_TOOLS_FIX = "mend or remove the column, or --tools-key COLUMN"
_LARGEST_MARGIN = 3.4028234663852886e38  # of float32, in which margins are stored


@dataclass(frozen=True)
class Columns:
    """Column names set by the user; None: the default name. `input` names the main column of any task."""

    text: str | None = None
    messages: str | None = None
    input: str | None = None
    output: str | None = None
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    margin: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class NormalRecord:
    """A record in its normal form: `text` for pretrain; `conversations` for sft (1) and preference (2: chosen,
    rejected); `prompt` for prompts.

    `tools`: what the conversations or the prompt may call, for the chat template.
    """

    text: str | None = None
    conversations: tuple[Conversation, ...] = ()
    prompt: list[Message] | str | None = None
    margin: float | None = None
    label: Any = None
    tools: list[Any] | None = None


def normalise(record: Any, task: str, columns: Columns, *, plain: bool) -> NormalRecord:
    """The sample in `record`. Raises RowProblem. `plain`: prompts and answers are strings (--input-template)."""
    if not isinstance(record, dict):
        raise RowProblem("not_object", f"the row is {_kind(record)}, not a JSON object",
                         expected="an object with named columns", fix="one object a row")
    sample = {"pretrain": _pretrain, "sft": _sft, "preference": _preference, "prompts": _prompts}[task](
        record, columns, plain
    )
    if task == "pretrain":
        return sample
    _refuse_unused(record, columns, sample)
    tools = _tools(record, columns)
    return replace(sample, tools=tools) if tools else sample


def _refuse_unused(record: dict[str, Any], columns: Columns, sample: NormalRecord) -> None:
    """Raises RowProblem for a column with content that would be left out, unless a message holds the same text."""
    named = vars(columns).values()
    for key in (*_CONTENT_COLUMNS, *_MEDIA):
        value = record.get(key)
        is_empty = not value.strip() if isinstance(value, str) else not value
        if key in named or is_empty or not isinstance(value, (str, list, dict)):
            continue
        prompt = [sample.prompt] if isinstance(sample.prompt, str) else sample.prompt or []
        conversations = sample.conversations or (prompt,)
        texts = [m if isinstance(m, str) else m.get("content") or "" for c in conversations for m in c]
        if not isinstance(value, str) or not any(value.strip() in text for text in texts):
            expected = "all content in messages (a system turn, earlier turns), tools in 'tools'"
            raise RowProblem(f"unused:{key}", f"column '{key}' is {_kind(value)} that would be left out",
                             expected="text alone" if key in _MEDIA else expected,
                             fix=f"{'' if key in _MEDIA else 'move it there, or '}remove the column")


def _tools(record: dict[str, Any], columns: Columns) -> list[Any] | None:
    """The tools column: a list of objects, or it or they as JSON strings. None where it is missing, null or empty."""
    key = columns.tools or "tools"
    if columns.tools:
        _column(record, key, "--tools-key COLUMN")
    tools = record.get(key)
    if isinstance(tools, (str, list)):
        try:
            tools = json.loads(tools.strip() or "null") if isinstance(tools, str) else tools
            if isinstance(tools, list):
                tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        except ValueError as error:
            raise _wrong_type(key, tools, _TOOLS_EXPECTED, _TOOLS_FIX) from error
    if not tools:
        return None
    if not _is_messages(tools):
        raise _wrong_type(key, tools, _TOOLS_EXPECTED, _TOOLS_FIX)
    return _without_nulls(tools)


def _without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, at every depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _pretrain(record: dict[str, Any], columns: Columns, plain: bool) -> NormalRecord:
    key = columns.text or columns.input or "text"
    text = _column(record, key, _suggest(record, "text"))
    if not isinstance(text, str):
        raise _wrong_type(key, text, "a string", "--text-key COLUMN")
    if not text.strip():
        raise _empty(f"column '{key}' is empty")
    return NormalRecord(text=text)


def _sft(record: dict[str, Any], columns: Columns, plain: bool) -> NormalRecord:
    messages_key = columns.messages or "messages"
    if columns.messages or (columns.input is None and messages_key in record):
        return NormalRecord(conversations=(_conversation(record, messages_key, plain, "messages"),))
    input_key, output_key = columns.input or "input", columns.output or "output"
    if columns.input is None and not {input_key, output_key} & record.keys():
        if (conversation := _only(record, "messages")) is not None:
            _messages(record[conversation], conversation, "messages")  # other keys than role and content come first
        raise _missing(record, messages_key, _suggest_sft(record), "'messages', or 'input' and 'output'")
    given = _column(record, input_key, _suggest(record, "input", taken=(output_key,)))
    is_alone = columns.output is None and output_key not in record and _is_messages(given)
    if is_alone and (_ends_on_answer(given) or not _only(record, "output", (input_key,))):
        return NormalRecord(conversations=(_conversation(record, input_key, plain, "input"),))
    answer = _column(record, output_key, _suggest(record, "output", taken=(input_key,)))
    if columns.input is None:
        _refuse_instruction(record)
    types = {type(given), type(answer)}
    if types == {list}:
        given, answer = _messages(given, input_key, "input"), _one_answer(answer, output_key, "output")
    elif types != {str}:
        raise RowProblem("input_output_types",
                         f"column '{input_key}' is {_kind(given)} and column '{output_key}' is {_kind(answer)}",
                         expected="two strings, or a list of messages and a list with the final assistant message",
                         fix="--input-key COLUMN --output-key COLUMN")
    return NormalRecord(conversations=(_join(given, answer, plain, input_key, output_key),))


def _suggest_sft(record: dict[str, Any]) -> str:
    """The options that name the columns of `record` which hold the conversation."""
    if conversation := _only(record, "messages"):
        return f"--input-key {shlex.quote(conversation)}"
    question = _only(record, "input")
    answer = _only(record, "output", () if question is None else (question,))
    if question and answer:
        return f"--input-key {shlex.quote(question)} --output-key {shlex.quote(answer)}"
    named = [k for k, v in record.items() if _looks_like_messages(v) and k.lower() in _CONVERSATIONS]
    return f"--input-key {shlex.quote(named[0])}" if len(named) == 1 else "--input-key COLUMN [--output-key COLUMN]"


def _refuse_instruction(record: dict[str, Any]) -> None:
    if isinstance(record.get("instruction"), str) and record["instruction"].strip():
        raise RowProblem("instruction", "column 'instruction' stands beside 'input' and would be ignored",
                         expected="instruction and input joined in one column",
                         fix="join them in a further column, then --input-key COLUMN")


def _preference(record: dict[str, Any], columns: Columns, plain: bool) -> NormalRecord:
    keys = {"chosen": columns.chosen or "chosen", "rejected": columns.rejected or "rejected"}
    prompt_key = columns.prompt or columns.input or "prompt"
    taken = (prompt_key, *keys.values())
    answers = [_column(record, key, _suggest(record, name, taken)) for name, key in keys.items()]
    if columns.prompt or columns.input:
        _column(record, prompt_key, _suggest(record, "prompt", taken))
    margin = _margin(record, columns.margin or "margin")
    whole = all(_is_messages(answer) and len(answer) > 1 for answer in answers)
    pair = (_whole_conversations if whole else _prompt_with_answers)(record, prompt_key, keys, plain)
    return NormalRecord(conversations=pair, margin=margin)


def _margin(record: dict[str, Any], key: str) -> float | None:
    margin = record.get(key)
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) <= _LARGEST_MARGIN:
        raise _wrong_type(key, margin, "a finite number that float32 holds", "--margin-key COLUMN")
    return float(margin)


def _whole_conversations(
    record: dict[str, Any], prompt_key: str, keys: dict[str, str], plain: bool
) -> tuple[Conversation, ...]:
    """The chosen and the rejected conversation of a row that holds both whole; a prompt beside them must be theirs."""
    conversations = tuple(_conversation(record, key, plain, name) for name, key in keys.items())
    chosen, rejected = (record[key] for key in keys.values())
    if chosen[:-1] != rejected[:-1]:
        raise RowProblem("pair_prefix", "chosen and rejected differ before their last message",
                         expected="two conversations that share everything but the final assistant message",
                         fix="cut both after the first message that differs")
    prompt: Any = record.get(prompt_key)
    stated = prompt[-1].get("content") if _looks_like_messages(prompt) else prompt
    if prompt is not None and stated not in (chosen[-2].get("content"), chosen[0].get("content")):
        answers = f"only the answers in '{keys['chosen']}' and '{keys['rejected']}'"
        raise RowProblem("pair_prompt", f"column '{prompt_key}' is not the prompt that '{keys['chosen']}' begins with",
                         expected=f"{answers}, or the same prompt in both places",
                         fix="remove the column, or leave only the assistant's message in the answers")
    return conversations


def _prompt_with_answers(
    record: dict[str, Any], prompt_key: str, keys: dict[str, str], plain: bool
) -> tuple[Conversation, ...]:
    """The conversations that the row's prompt makes with its chosen and its rejected answer."""
    prompt = record.get(prompt_key)
    if prompt is None:
        fix = _suggest_prompt(record, keys)
        if prompt_key in record:
            _column(record, prompt_key, fix)
        raise _missing(record, prompt_key, fix, "a prompt, or whole conversations in both")
    if not isinstance(prompt, str):
        prompt = _messages(prompt, prompt_key, "prompt")
    pair = []
    for name, key in keys.items():
        answer = record[key] if isinstance(record[key], str) else _one_answer(record[key], key, name)
        pair.append(_join(prompt, answer, plain, prompt_key, key))
    return tuple(pair)


def _suggest_prompt(record: dict[str, Any], keys: dict[str, str]) -> str:
    fix = _suggest(record, "prompt", keys.values())
    if fix.endswith("COLUMN") and all(isinstance(record[key], str) for key in keys.values()):
        fix += ", or move the prompt, if both answers begin with it, into a column of its own: prompt"
    return fix


def _prompts(record: dict[str, Any], columns: Columns, plain: bool) -> NormalRecord:
    key = columns.prompt or columns.input or ("prompt" if "prompt" in record or "input" not in record else "input")
    prompt = _column(record, key, _suggest(record, "prompt", (columns.label or "label",)))
    if columns.label:
        _column(record, columns.label, _suggest(record, "label", (key,)))
    label = record.get(columns.label or "label")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _empty(f"column '{key}' is empty")
        return NormalRecord(prompt=prompt if plain else [{"role": "user", "content": prompt}], label=label)
    messages = _messages(prompt, key, "prompt")
    if messages[-1]["role"] == "assistant":
        raise RowProblem("prompt_role", f"column '{key}' ends with a turn of the assistant",
                         expected="a list of messages that ends with a user turn",
                         fix="remove the last message, or --prompt-key COLUMN")
    return NormalRecord(prompt=_single_turn(messages, key) if plain else messages, label=label)


def _conversation(record: dict[str, Any], key: str, plain: bool, role: str) -> Conversation:
    flag = f"--{role}-key COLUMN"
    messages = _messages(_column(record, key, _suggest(record, role)), key, role)
    if messages[-1]["role"] != "assistant":
        raise RowProblem("last_role", f"column '{key}' ends with a turn of '{messages[-1]['role']}'",
                         expected="a conversation whose last message is the assistant's",
                         fix=f"remove what follows the last answer, or {flag}")
    if len(messages) == 1:
        raise RowProblem("no_prompt", f"column '{key}' holds an answer and no prompt",
                         expected="at least one turn before the assistant's", fix=flag)
    return (_single_turn(messages[:-1], key), _string_content(messages[-1], key)) if plain else messages


def _messages(value: Any, key: str, role: str) -> list[Message]:
    """`value`, a list of {role, content}, in its normal form; other keys pass through to the chat template."""
    expected = 'a list of {"role": ..., "content": ...}'
    if not isinstance(value, list):
        raise _wrong_type(key, value, expected, f"--{role}-key COLUMN")
    if not value:
        raise _empty(f"column '{key}' has no messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowProblem("message_type", f"message {i} of column '{key}' is {_kind(message)}", expected=expected,
                             fix=f"--{role}-key COLUMN")
        if not isinstance(message.get("role"), str) or not ("content" in message or _has_calls(message)):
            names = "from to role, value to content, human to user, gpt to assistant" if "from" in message else (
                "them to role and content (user, assistant, system)")
            then = "" if key == role else f", then --{role}-key {shlex.quote(key)}"
            raise RowProblem("message_keys", f"message {i} of column '{key}' has the keys {sorted(message)}",
                             expected=expected, fix=f"rename {names}{then}")
        message = _normal_message(message, f"message {i} of column '{key}'")
        if not _has_calls(message) and not (message.get("content") or "").strip():
            if message["role"] in ("system", "developer"):
                continue
            raise _empty(f"message {i} of column '{key}' ({message['role']}) is empty")
        messages.append(message)
    if not messages:
        raise _empty(f"column '{key}' has no messages but an empty system turn")
    return messages


def _has_calls(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _normal_message(message: Message, where: str) -> Message:
    """The message without nulls, but for its content, and with a list of text parts joined."""
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise RowProblem("content_type", f"content of {where} is {_kind(content)}", expected="a string",
                         fix="mend the data")
    for key in _MEDIA:
        if message.get(key):
            raise RowProblem("media", f"{where} has '{key}', which would be left out", expected="text alone",
                             fix="remove it, or the row")
    calls = message.get("tool_calls") or [], message.get("function_call") or {}
    if not _is_messages(calls[0]) or not all(
        isinstance(call, dict) and isinstance(call.get("function") or {}, dict) for call in (*calls[0], calls[1])
    ):
        raise RowProblem("call_type", f"a tool call of {where} is no object",
                         expected='"tool_calls": [{"function": {"name": ..., "arguments": ...}}, ...]',
                         fix="parse it in the data, where it is a JSON string")
    for key in REASONING_KEYS:
        if message.get(key) and not isinstance(message[key], str):
            raise RowProblem("reasoning_type", f"'{key}' of {where} is {_kind(message[key])}", expected="a string",
                             fix="mend the data")
    normal = {name: _without_nulls(value) for name, value in message.items() if value is not None or name == "content"}
    if isinstance(content, list):
        normal["content"] = "".join(_text_of(part, where) for part in normal["content"])
    return normal


def _text_of(part: Any, where: str) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and part.keys() <= {"type", "text"} and part.get("type", "text") == "text"
    if not is_text or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        kind = sorted(part) if isinstance(part, dict) and kind in (None, "text") else kind
        raise RowProblem("content_part", f"the content of {where} has a part of the kind {kind!r}",
                         expected='text parts, {"type": "text", "text": ...}', fix="remove such parts, or the row")
    return part["text"]


def _one_answer(value: Any, key: str, role: str) -> Message:
    messages = _messages(value, key, role)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowProblem("answer_list", f"column '{key}' holds the turns {[m['role'] for m in messages]}",
                         expected="a list holding one assistant message, or a string",
                         fix=f"--{role}-key COLUMN")
    return messages[0]


def _join(
    prompt: list[Message] | str, answer: Message | str, plain: bool, prompt_key: str, answer_key: str
) -> Conversation:
    for key, value in ((prompt_key, prompt), (answer_key, answer)):
        if isinstance(value, str) and not value.strip():
            raise _empty(f"column '{key}' is empty")
    if plain:
        return (prompt if isinstance(prompt, str) else _single_turn(prompt, prompt_key),
                answer if isinstance(answer, str) else _string_content(answer, answer_key))
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*before, {"role": "assistant", "content": answer} if isinstance(answer, str) else answer]


def _single_turn(messages: list[Message], key: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise RowProblem(
            "plain_turns",
            f"column '{key}' has turns {[m['role'] for m in messages]}, which a plain --input-template cannot render",
            expected="one user turn before the answer", fix="--chat-template FILE instead of --input-template"
        )
    return _string_content(messages[0], key)


def _string_content(message: Message, key: str) -> str:
    ignored = [name for name in (*REASONING_KEYS, "tool_calls", "function_call") if message.get(name)]
    if not isinstance(message.get("content"), str) or ignored:
        what = f"with {', '.join(ignored)}" if ignored else "whose content is not a string"
        what = f"column '{key}' has a message {what}, which a plain --input-template leaves out"
        raise RowProblem("plain_content", what,
                         fix="--chat-template FILE instead of --input-template")
    return message["content"]


def _column(record: dict[str, Any], key: str, fix: str) -> Any:
    if key not in record:
        raise _missing(record, key, fix, None)
    if record[key] is None:
        raise RowProblem(f"null:{key}", f"column '{key}' is null", expected="a value in every row",
                         fix=f"remove such rows (--on-bad-row drop), or {fix}")
    return record[key]


def _missing(record: dict[str, Any], key: str, fix: str, expected: str | None) -> RowProblem:
    return RowProblem(
        f"missing:{key}", f"column '{key}' is missing; found {sorted(record)}", expected=expected, fix=fix
    )


def _wrong_type(key: str, value: Any, expected: str, fix: str) -> RowProblem:
    return RowProblem(f"type:{key}", f"column '{key}' is {_kind(value)}", expected=expected, fix=fix)


def _empty(what: str) -> RowProblem:
    return RowProblem("empty", what, expected="text in every turn", fix="--on-empty drop")


def _suggest(record: dict[str, Any], role: str, taken: Collection[str] = ()) -> str:
    """The flag of `role` with the column that its name and type say is meant, else with a placeholder."""
    pick = _only(record, role, taken)
    return f"--{role}-key {'COLUMN' if pick is None else shlex.quote(pick)}"


def _only(record: dict[str, Any], role: str, taken: Collection[str] = ()) -> str | None:
    """The one column of `record` with a name and a type for `role`; `taken` are columns of other roles.

    A whole conversation needs no name.
    """
    names = _SYNONYMS.get(role, "").split()
    fitting = [k for k, v in record.items() if k not in taken and _fits(v, role)]
    picks = fitting if role == "messages" else [k for k in fitting if k.lower() in names]
    return picks[0] if len(picks) == 1 else None


def _fits(value: Any, role: str) -> bool:
    """Whether the value has a type that the role takes; messages count as what their last turn makes them."""
    if isinstance(value, str) or role == "label":
        return role != "messages" and value is not None
    if not _looks_like_messages(value) or role == "text":
        return False
    whole, answers = len(value) > 1, _ends_on_answer(value)
    return {"messages": whole and answers, "output": not whole and answers, "chosen": answers, "rejected": answers,
            "input": not answers, "prompt": not answers}[role]


def _ends_on_answer(messages: list[Message]) -> bool:
    return bool(messages) and (messages[-1].get("role") or messages[-1].get("from")) in ("assistant", "gpt")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) for m in value)


def _looks_like_messages(value: Any) -> bool:
    return _is_messages(value) and bool(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number",
             type(None): "null"}
    return names.get(type(value), type(value).__name__)
