"""Fixes of tools/preprocess_data.py that speak of columns and rows."""

from __future__ import annotations

import os
from typing import Any

from .harness import Scenario
from .rows import ASK, CHAT, GOOD, SHAREGPT, A, B, U, gives, prepare, row, rows_to, setting, then, without, write


def _to_messages(record: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    return {
        key: [{"role": roles[m["from"]], "content": m["value"]} for m in value] if isinstance(value, list) else value
        for key, value in record.items()
    }


def _split_prompt(record: dict[str, Any]) -> dict[str, Any]:
    shared = os.path.commonprefix([record["chosen"], record["rejected"]])
    return {"prompt": shared, **{key: record[key].removeprefix(shared) for key in ("chosen", "rejected")}}


def _without(column: str) -> Any:
    return rows_to(lambda r: {key: value for key, value in r.items() if key != column})


TOOLS_KEY = "--tools-key COLUMN"
REASONS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.reasoning_content + ' ' if m.reasoning_content }}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIR = (CHAT("blue"), CHAT("green"))
SCENARIOS = [
    # pretrain
    row("text elsewhere", "pretrain", {"content": "red", "id": "x"}, "--text-key content", "red[[<|im_end|>]]"),
    row("text is unclear", "pretrain", {"a": "red", "id": "x"}, "--text-key COLUMN", "red[[<|im_end|>]]", fill=("a",)),
    row(
        "text is a list",
        "pretrain",
        {"text": ["red"], "t": "red"},
        "--text-key COLUMN",
        "red[[<|im_end|>]]",
        fill=("t",),
    ),
    row(
        "text null",
        "pretrain",
        {"text": None, "content": "red"},
        "remove such rows .--on-bad-row drop., or --text-key content",
        "red[[<|im_end|>]]",
        take="--text-key content",
    ),
    # sft
    row("conversation elsewhere", "sft", {"my chat": [U, A]}, "--input-key 'my chat'", CHAT("blue")),
    row(
        "ShareGPT",
        "sft",
        {"conversations": SHAREGPT},
        "rename from to role, value to content, human to user, gpt to assistant, then --messages-key conversations",
        CHAT("blue"),
        by=then(rows_to(_to_messages), setting("--messages-key", "conversations")),
    ),
    row(
        "ShareGPT in messages",
        "sft",
        {"messages": SHAREGPT},
        "rename from to role, value to content, human to user, gpt to assistant",
        CHAT("blue"),
        by=rows_to(_to_messages),
    ),
    row(
        "TRL's prompt and completion",
        "sft",
        {"prompt": "red", "completion": "blue"},
        "--input-key prompt --output-key completion",
        CHAT("blue"),
    ),
    row(
        "completion before the prompt",
        "sft",
        {"completion": "blue", "prompt": "red"},
        "--input-key prompt --output-key completion",
        CHAT("blue"),
    ),
    row(
        "TRL's chats",
        "sft",
        {"prompt": [U], "completion": [A]},
        "--input-key prompt --output-key completion",
        CHAT("blue"),
    ),
    row(
        "TRL's chats, half said",
        "sft",
        {"prompt": [U], "completion": [A]},
        "--output-key completion",
        CHAT("blue"),
        input_key="prompt",
    ),
    row(
        "question and answer",
        "sft",
        {"answer": "blue", "question": "red", "id": "z"},
        "--input-key question --output-key answer",
        CHAT("blue"),
    ),
    row(
        "two questions",
        "sft",
        {"instruction": "red", "context": "x", "response": "blue"},
        r"--input-key COLUMN \[--output-key COLUMN\]",
        CHAT("blue"),
        by=then(setting("--input-key", "instruction"), setting("--output-key", "response")),
    ),
    row("unfinished conversation", "sft", {"chat": [U]}, "--input-key chat", next="ends with a turn of 'user'"),
    row("input alone", "sft", {"input": "red", "reply": "blue"}, "--output-key reply", CHAT("blue")),
    row("output alone", "sft", {"instruction": "red", "output": "blue"}, "--input-key instruction", CHAT("blue")),
    row(
        "string and list",
        "sft",
        {"input": "red", "output": ["blue"], "text": "blue"},
        "--input-key COLUMN --output-key COLUMN",
        CHAT("blue"),
        fill=("input", "text"),
    ),
    row(
        "instruction beside input",
        "sft",
        {"instruction": "re", "input": "d", "output": "blue"},
        "join them in a further column, then --input-key COLUMN",
        CHAT("blue"),
        take="--input-key COLUMN",
        fill=("all",),
        by=then(rows_to(lambda r: {"all": r["instruction"] + r["input"], **r}), setting("--input-key", "all")),
    ),
    row(
        "wrong messages key", "sft", {"messages": [U, A]}, "--messages-key messages", CHAT("blue"), messages_key="chat"
    ),
    row(
        "messages are a string",
        "sft",
        {"messages": "x", "c": [U, A]},
        "--messages-key COLUMN",
        CHAT("blue"),
        fill=("c",),
    ),
    row(
        "messages of strings",
        "sft",
        {"messages": ["x"], "c": [U, A]},
        "--messages-key COLUMN",
        CHAT("blue"),
        fill=("c",),
    ),
    row(
        "other keys in a message",
        "sft",
        {"messages": [{"user": "x"}]},
        r"rename them to role and content \(user, assistant, system\)",
        CHAT("blue"),
        by=rows_to(lambda r: GOOD),
    ),
    row(
        "reasoning is a list",
        "sft",
        {"messages": [U, {**A, "reasoning": ["hm"]}]},
        "mend the data",
        CHAT("blue"),
        by=rows_to(lambda r: GOOD),
    ),
    row(
        "content is a number",
        "sft",
        {"messages": [U, {**A, "content": 3}]},
        "mend the data",
        CHAT("blue"),
        by=rows_to(lambda r: GOOD),
    ),
    row(
        "last turn is the user's",
        "sft",
        {"messages": [U, A, U], "c": [U, A]},
        "remove what follows the last answer, or --messages-key COLUMN",
        CHAT("blue"),
        take="--messages-key COLUMN",
        fill=("c",),
    ),
    row(
        "last turn is cut",
        "sft",
        {"messages": [U, A, U]},
        "remove what follows the last answer, or .*",
        CHAT("blue"),
        by=rows_to(lambda r: {"messages": r["messages"][:2]}),
    ),
    row(
        "answer without a prompt",
        "sft",
        {"messages": [A], "c": [U, A]},
        "--messages-key COLUMN",
        CHAT("blue"),
        fill=("c",),
    ),
    row(
        "output of two turns",
        "sft",
        {"input": [U], "output": [U, A], "o": [A]},
        "--output-key COLUMN",
        CHAT("blue"),
        fill=("o",),
    ),
    Scenario(
        "null messages",
        prepare("sft", [GOOD, {"messages": None}]),
        "remove such rows .--on-bad-row drop., or --messages-key COLUMN",
        take="--on-bad-row drop",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "empty answer",
        prepare("sft", [GOOD, {"messages": [U, {**A, "content": " "}]}]),
        "--on-empty drop",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no object", prepare("sft", [[1]]), "one object a row", by=rows_to(lambda r: GOOD), right=gives(CHAT("blue"))
    ),
    *(
        row(
            f"tools {name}",
            "sft",
            {**GOOD, **record},
            f"(mend or remove the column, or )?{TOOLS_KEY}",
            CHAT("blue"),
            take=TOOLS_KEY,
            fill=("n",),
            **changes,
        )
        for name, record, changes in (
            ("missing", {"n": []}, {"tools_key": "tools"}),
            ("no JSON", {"tools": "x", "n": []}, {}),
            ("of strings", {"tools": ["x"], "n": []}, {}),
            ("in an object", {"tools": {"x": {}}, "n": []}, {}),
        )
    ),
    row(
        "tools that are no tools",
        "sft",
        {**GOOD, "tools": "x"},
        f"mend or remove the column, or {TOOLS_KEY}",
        CHAT("blue"),
        by=rows_to(lambda r: GOOD),
    ),
    # content that no form uses
    row(
        "system in a column",
        "sft",
        {**GOOD, "system": "be kind"},
        "move it there, or remove the column",
        "<|im_start|>system\nbe kind<|im_end|>\n" + CHAT("blue"),
        by=rows_to(lambda r: {"messages": [{"role": "system", "content": r["system"]}, *r["messages"]]}),
    ),
    row(
        "system in a column, removed",
        "sft",
        {**GOOD, "system": "be kind"},
        "move it there, or remove the column",
        CHAT("blue"),
        by=rows_to(lambda r: GOOD),
    ),
    row(
        "image in a column", "sft", {**GOOD, "image": "a.png"}, "remove the column", CHAT("blue"), by=_without("image")
    ),
    *(
        Scenario(
            f"{name} of a message{', dropped' * drops}",
            prepare("sft", [GOOD, {"messages": [message, A]}]),
            fix,
            by=setting("--on-bad-row", "drop") if drops else rows_to(lambda r: GOOD),
            right=gives(*[CHAT("blue")] * (1 if drops else 2)),
        )
        for name, message, fix in (
            ("image", {**U, "images": ["a.png"]}, "remove it, or the row"),
            (
                "image part",
                {"role": "user", "content": [{"type": "text", "text": "red"}, {"type": "image"}]},
                "remove such parts, or the row",
            ),
        )
        for drops in (False, True)
    ),
    row(
        "reasoning in a plain text",
        "sft",
        {"messages": [U, {**A, "reasoning_content": "hm"}]},
        "--chat-template FILE instead of --input-template",
        CHAT("hm blue"),
        by=then(
            lambda bench, command, fix: command.set("--chat-template", str(write("r.jinja", REASONS)(bench))),
            without("--input-template"),
        ),
        input_template="{} ",
    ),
    # preference
    row(
        "prompt inside the answers",
        "preference",
        {"chosen": "red blue", "rejected": "red green"},
        "--prompt-key COLUMN, or move the prompt, if both answers begin with it, into a column of its own: prompt",
        *(CHAT(text).replace("red<", "red <") for text in ("blue", "green")),
        by=rows_to(_split_prompt),
    ),
    row(
        "the worse answer is no prompt",
        "preference",
        {"chosen": "blue", "rejected": "green", "source": "x", "p": "red"},
        "--prompt-key COLUMN, or move the prompt.*",
        *PAIR,
        take="--prompt-key COLUMN",
        fill=("p",),
    ),
    row(
        "question of a pair",
        "preference",
        {"question": "red", "chosen": "blue", "rejected": "green"},
        "--prompt-key question",
        *PAIR,
    ),
    row(
        "question of two messages",
        "preference",
        {"query": [U], "chosen": [A], "rejected": [B]},
        "--prompt-key query",
        *PAIR,
    ),
    row(
        "null prompt",
        "preference",
        {"prompt": None, "query": "red", "chosen": "blue", "rejected": "green"},
        "remove such rows .--on-bad-row drop., or --prompt-key query",
        *PAIR,
        take="--prompt-key query",
    ),
    row(
        "better and worse",
        "preference",
        {"prompt": "red", "better": "blue", "worse": "green"},
        "--chosen-key better",
        next="--rejected-key worse",
    ),
    row("worse", "preference", {"prompt": "red", "chosen": "blue", "worse": "green"}, "--rejected-key worse", *PAIR),
    row(
        "wrong prompt key",
        "preference",
        {"query": "red", "chosen": "blue", "rejected": "green"},
        "--prompt-key query",
        *PAIR,
        prompt_key="p",
    ),
    row(
        "two turns chosen",
        "preference",
        {"prompt": "red", "chosen": [A, B], "rejected": "green", "c": "blue"},
        "--chosen-key COLUMN",
        *PAIR,
        fill=("c",),
    ),
    row(
        "margin is a text",
        "preference",
        {"prompt": "red", "chosen": "blue", "rejected": "green", "margin": "x", "m": 1},
        "--margin-key COLUMN",
        *PAIR,
        fill=("m",),
    ),
    row(
        "conversations part early",
        "preference",
        {"chosen": [U, A], "rejected": [B, U, A]},
        "cut both after the first message that differs",
        by=rows_to(lambda r: {"chosen": [U, A], "rejected": [U, B]}),
    ),
    row(
        "prompt of another conversation",
        "preference",
        {"prompt": "x", "chosen": [U, A], "rejected": [U, B]},
        "remove the column, or leave only the assistant's message in the answers",
        *PAIR,
        by=rows_to(lambda r: {k: r[k] for k in ("chosen", "rejected")}),
    ),
    row(
        "answers of the user",
        "preference",
        {"prompt": "red", "chosen": [U], "rejected": [B], "c": [A]},
        "--chosen-key COLUMN",
        *PAIR,
        fill=("c",),
    ),
    Scenario(
        "margins of some",
        prepare(
            "preference", [{"prompt": "red", "chosen": "blue", "rejected": "green", **m} for m in ({}, {"margin": 1})]
        ),
        "give the other pairs a margin too, or remove the column",
        by=rows_to(lambda r: {"margin": 1, **r}),
        right=gives(*PAIR, *PAIR),
    ),
    # prompts
    row("prompt elsewhere", "prompts", {"question": "red", "answer": "3"}, "--prompt-key question", ASK),
    row(
        "label elsewhere", "prompts", {"prompt": "red", "answer": "3"}, "--label-key answer", ASK, label_key="solution"
    ),
    row(
        "prompt ends on an answer",
        "prompts",
        {"prompt": [U, A], "p": "red"},
        "remove the last message, or --prompt-key COLUMN",
        ASK,
        take="--prompt-key COLUMN",
        fill=("p",),
    ),
    row(
        "prompt ends on an answer, cut",
        "prompts",
        {"prompt": [U, A]},
        "remove the last message, or .*",
        ASK,
        by=rows_to(lambda r: {"prompt": r["prompt"][:1]}),
    ),
    *(
        row(
            f"one column as {first} and {second}",
            task,
            {
                "prompt": "red",
                "chosen": "blue",
                "rejected": "green",
                "q": "red",
                "input": "red",
                "output": "blue",
                "label": "c",
            },
            f"--{first}-key COLUMN, or --{second}-key COLUMN",
            *expected,
            take=f"--{first}-key COLUMN",
            fill=(good,),
            **{f"{flag}_key": column},
        )
        for task, first, second, good, flag, column, expected in (
            ("preference", "prompt", "rejected", "q", "prompt", "rejected", PAIR),
            ("preference", "chosen", "rejected", "chosen", "chosen", "rejected", PAIR),
            ("prompts", "prompt", "label", "q", "prompt", "label", (ASK,)),
        )
    ),
    row(
        "one column as input and output",
        "sft",
        {"input": "red", "output": "blue"},
        "--input-key COLUMN, or --output-key COLUMN",
        CHAT("blue"),
        take="--input-key COLUMN",
        fill=("input",),
        input_key="output",
    ),
]
