from __future__ import annotations

import json
from typing import Any

import pytest

from mrlhf.data.prepare.formats import Columns, normalise
from mrlhf.errors import RowProblem

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
S = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "columns", "plain", "expected"),
    [
        ({"messages": [S, U, A]}, Columns(), False, [S, U, A]),
        ({"chat": [U, A]}, Columns(input="chat"), False, [U, A]),
        ({"chat": [U, A]}, Columns(messages="chat"), False, [U, A]),
        ({"input": "q", "output": "a"}, Columns(), False, [U, A]),
        ({"input": [S, U], "output": [A]}, Columns(), False, [S, U, A]),
        ({"x": "q", "y": "a", "messages": 1}, Columns(input="x", output="y"), False, [U, A]),
        ({"input": "q", "output": "a"}, Columns(), True, ("q", "a")),
        ({"input": [U], "output": [A]}, Columns(), True, ("q", "a")),
        ({"messages": [U, A]}, Columns(), True, ("q", "a")),
    ],
)
def test_sft_rows(record: dict[str, Any], columns: Columns, plain: bool, expected: Any) -> None:
    assert normalise(record, "sft", columns, plain=plain).conversations == (expected,)


@pytest.mark.parametrize(
    ("record", "margin"),
    [
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, None),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}, 2.0),
        ({"prompt": "q", "chosen": [A], "rejected": "b"}, None),
        ({"chosen": [U, A], "rejected": [U, B], "margin": 0.5}, 0.5),
        ({"prompt": "q", "chosen": [U, A], "rejected": [U, B]}, None),
        ({"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, None),
    ],
)
def test_preference_rows(record: dict[str, Any], margin: float | None) -> None:
    sample = normalise(record, "preference", Columns(), plain=False)
    assert sample.conversations == ([U, A], [U, B]) and sample.margin == margin
    assert normalise(record, "preference", Columns(), plain=True).conversations == (("q", "a"), ("q", "b"))


def test_prompt_and_text_rows() -> None:
    assert normalise({"prompt": [S, U], "label": {"n": 3}}, "prompts", Columns(), plain=False).prompt == [S, U]
    sample = normalise({"input": "q", "answer": [1]}, "prompts", Columns(label="answer"), plain=False)
    assert (sample.prompt, sample.label) == ([U], [1])
    assert normalise({"input": "q"}, "prompts", Columns(), plain=True).prompt == "q"
    assert normalise({"text": "t"}, "pretrain", Columns(), plain=True).text == "t"
    assert normalise({"content": "t"}, "pretrain", Columns(text="content"), plain=True).text == "t"


@pytest.mark.parametrize(
    ("task", "record", "columns", "what", "fix"),
    [
        (
            "sft",
            {"conversation": [U, A], "id": 1},
            Columns(),
            r"column 'messages' is missing; found \['conversation', 'id'\]",
            "--input-key conversation",
        ),
        ("sft", {"q": "x", "a": "y"}, Columns(), "column 'messages' is missing", "--input-key q --output-key a"),
        ("sft", {"input": "x", "reply": "y"}, Columns(), "column 'output' is missing", "--output-key reply"),
        ("sft", {"input": "x", "output": ["y"]}, Columns(), "is a string and column 'output' is a list", "--input-key"),
        (
            "sft",
            {"instruction": "sum", "input": "x", "output": "y"},
            Columns(),
            "'instruction' stands beside",
            "--input-key",
        ),
        ("sft", {"messages": [U]}, Columns(), "ends with a turn of 'user'", "last answer"),
        ("sft", {"messages": [A]}, Columns(), "no prompt", "--messages-key"),
        ("sft", {"messages": "hello"}, Columns(), "is a string", "--messages-key"),
        (
            "sft",
            {"messages": [{"from": "human", "value": "x"}, A]},
            Columns(),
            r"has the keys \['from', 'value'\]",
            "rename",
        ),
        (
            "sft",
            {"messages": [U, {"role": "assistant", "content": 3}]},
            Columns(),
            "content of message 1 .* is a number",
            "mend",
        ),
        ("sft", {"messages": None}, Columns(), "is null", "remove such rows"),
        (
            "sft",
            {"messages": [U, {"role": "assistant", "content": " "}]},
            Columns(),
            r"message 1 .*is empty",
            "--on-empty drop",
        ),
        ("sft", [1], Columns(), "the row is a list", "one object a row"),
        ("sft", {"messages": [U, A]}, Columns(messages="chat"), "column 'chat' is missing", "--messages-key messages"),
        ("preference", {"chosen": [U, A], "rejected": [S, U, B]}, Columns(), "differ before their last", "cut both"),
        (
            "preference",
            {"chosen": "a", "rejected": "b", "question": "q"},
            Columns(),
            "column 'prompt' is missing",
            "--prompt-key",
        ),
        (
            "preference",
            {"prompt": "q", "chosen": "a", "bad": "b"},
            Columns(),
            "column 'rejected' is missing",
            "--rejected-key",
        ),
        (
            "preference",
            {"prompt": "other", "chosen": [U, A], "rejected": [U, B]},
            Columns(),
            "is not the prompt that",
            "remove the column",
        ),
        (
            "preference",
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"},
            Columns(),
            "column 'margin' is a string",
            "--margin-key",
        ),
        (
            "preference",
            {"prompt": "q", "chosen": "a", "rejected": " "},
            Columns(),
            "column 'rejected' is empty",
            "--on-empty drop",
        ),
        ("prompts", {"prompt": [U, A]}, Columns(), "ends with a turn of the assistant", "--prompt-key"),
        ("prompts", {"question": "q"}, Columns(), "column 'prompt' is missing", "--prompt-key question"),
        ("prompts", {"prompt": "q"}, Columns(label="gold"), "column 'gold' is missing", "--label-key"),
        (
            "pretrain",
            {"content": "q"},
            Columns(),
            r"column 'text' is missing; found \['content'\]",
            "--text-key content",
        ),
        ("pretrain", {"text": 4}, Columns(), "column 'text' is a number", "--text-key"),
        ("pretrain", {"text": "  "}, Columns(), "column 'text' is empty", "--on-empty drop"),
    ],
)
def test_rows_that_fit_no_form_name_the_flag(task: str, record: Any, columns: Columns, what: str, fix: str) -> None:
    with pytest.raises(RowProblem, match=what) as caught:
        normalise(record, task, columns, plain=False)
    assert fix in caught.value.fix


def test_plain_template_refuses_several_turns() -> None:
    with pytest.raises(RowProblem, match="cannot render"):
        normalise({"messages": [U, A, U, A]}, "sft", Columns(), plain=True)


def test_tools_column() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    answers = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for task, row in (("sft", {"messages": chat}), ("prompts", {"prompt": "q"}), ("preference", answers)):
        for given in (tools, json.dumps(tools)):
            assert normalise({**row, "tools": given}, task, Columns(), plain=False).tools == tools
            assert normalise({**row, "functions": given}, task, Columns(tools="functions"), plain=False).tools == tools
        for none in (None, [], "", "[]"):
            assert normalise({**row, "tools": none}, task, Columns(), plain=False).tools is None
        for wrong in ("{broken", "7", ["add"], {"name": "add"}, 7):
            with pytest.raises(RowProblem, match="column 'tools' is"):
                normalise({**row, "tools": wrong}, task, Columns(), plain=False)
        with pytest.raises(RowProblem, match="column 'functions' is missing"):
            normalise(row, task, Columns(tools="functions"), plain=False)
