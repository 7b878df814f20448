"""Fixes of tools/preprocess_data.py: rows, columns, templates, files. The data made is decoded and compared."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mrlhf.data.indexed import PackedDataset
from mrlhf.data.prepare import job as preprocessing
from mrlhf.data.prepare.options import PreprocessConfig
from mrlhf.data.show import marked
from mrlhf.data.tokenizers.vocabulary import load_tokenizer

from .harness import Command, Scenario

U, A, B = (
    {"role": role, "content": text} for role, text in (("user", "red"), ("assistant", "blue"), ("assistant", "green"))
)
CHAT = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n[[{}<|im_end|>]]".format
ASK = "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
GOOD = {"messages": [U, A]}
SHAREGPT = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "blue"}]


def made(prefix: str) -> list[str]:
    """The samples of a data set in its order, the trained part in brackets."""
    data = PackedDataset.open(prefix, verify=True)
    tokenizer = load_tokenizer(data.meta["tokenizer"])
    return sorted(marked(tokenizer, *data.sample(i)[1:]) for i in range(data.num_samples))


def prepare(task: str, rows: list[Any] | str | None, **changes: Any) -> Callable[[SimpleNamespace], Command]:
    """The command on a file of these rows; `changes` of its flags: a function of the bench, or a text ("" for none)."""

    def run(command: Command) -> Any:
        script = sys_script()
        values = vars(script.parser().parse_args(command.flags))
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if values["input_template"] is not None:
            values["input_template"] = script.plain_template(values["input_template"])
        prefixes = preprocessing.preprocess(PreprocessConfig(**values))
        return [text for prefix in prefixes for text in made(prefix)]

    def make(bench: SimpleNamespace) -> Command:
        file = bench.tmp / "rows.jsonl"
        if rows is not None:
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            file.write_text(text)
        values = {
            "task": task,
            "input": file,
            "tokenizer": bench.world / "qwen2",
            "output_prefix": bench.tmp / "out",
            "seq_length": 64,
            "workers": 1,
            "tokenizer_backend": "hf",
        } | changes
        flags = []
        for name, value in values.items():
            value = value(bench) if callable(value) else value
            flags += [f"--{name.replace('_', '-')}", *([str(value)] if value != "" else [])]
        return Command(run, flags)

    return make


def sys_script() -> Any:
    from test_fixes import Bench

    return Bench.load("tools/preprocess_data.py")


def gives(*samples: str) -> Callable[[Any, Any], None]:
    def right(bench: SimpleNamespace, result: Any) -> None:
        assert result == sorted(samples), result

    return right


def rows_to(change: Callable[[Any], Any]) -> Callable[[SimpleNamespace, Command, str], None]:
    """Changes every row of the file; None removes it."""

    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        file = bench.tmp / "rows.jsonl"
        rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))

    return by


def then(*steps: Callable[[SimpleNamespace, Command, str], None]) -> Callable[[SimpleNamespace, Command, str], None]:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        for step in steps:
            step(bench, command, fix)

    return by


def setting(*flag: str) -> Callable[[SimpleNamespace, Command, str], None]:
    return lambda bench, command, fix: command.set(*flag)


def without(flag: str) -> Callable[[SimpleNamespace, Command, str], None]:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        command.set(flag)
        command.flags.remove(flag)

    return by


def row(
    name: str,
    task: str,
    record: Any,
    fix: str,
    *samples: str,
    take: str | None = None,
    fill: tuple[Any, ...] = (),
    by: Any = None,
    next: str | None = None,
    **changes: Any,
) -> Scenario:
    """One wrong row, given twice."""
    right = gives(*(s for s in samples for _ in range(2))) if samples else None
    return Scenario(
        name, prepare(task, [record] * 2, **changes), fix, take=take, fill=fill, by=by, next=next, right=right
    )


def _to_messages(record: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    return {
        key: [{"role": roles[m["from"]], "content": m["value"]} for m in value] if isinstance(value, list) else value
        for key, value in record.items()
    }


def _split_prompt(record: dict[str, Any]) -> dict[str, Any]:
    shared = os.path.commonprefix([record["chosen"], record["rejected"]])
    return {"prompt": shared, **{key: record[key].removeprefix(shared) for key in ("chosen", "rejected")}}


PAIR = (CHAT("blue"), CHAT("green"))
COLUMNS = [
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
        row(f"tools {name}", "sft", {**GOOD, **record}, "--tools-key COLUMN", CHAT("blue"), fill=("n",), **changes)
        for name, record, changes in (
            ("missing", {"n": []}, {"tools_key": "tools"}),
            ("no JSON", {"tools": "x", "n": []}, {}),
            ("of strings", {"tools": ["x"], "n": []}, {}),
        )
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


def write(name: str, content: str | bytes) -> Callable[[SimpleNamespace], Path]:
    def make(bench: SimpleNamespace) -> Path:
        path = bench.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def template(
    name: str,
    source: str,
    fix: str,
    *,
    rows: Any = GOOD,
    take: str | None = None,
    fill: tuple[Any, ...] = (),
    by: Any = None,
    **changes: Any,
) -> Scenario:
    """One that the chat template `source` causes; a good one is at GOOD."""

    def with_good(bench: SimpleNamespace, command: Command, fix: str) -> None:
        command.set("--chat-template", "chatml")

    values = {"chat_template": write("template.jinja", source)} | changes
    return Scenario(
        name, prepare("sft", [rows], **values), fix, take=take, fill=fill, by=by or with_good, right=gives(CHAT("blue"))
    )


TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = "--chat-template FILE with {% generation %} ... {% endgeneration %} around the assistant's turns"


def _marked(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The template that the fix describes."""
    body = (
        "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}"
    )
    command.set("--chat-template", str(write("marked.jinja", LOOP.replace("BODY", body))(bench)))


def tokenizer(**changes: Any) -> Callable[[SimpleNamespace], Path]:
    """The world's tokenizer with other entries in its configuration; None removes one."""

    def make(bench: SimpleNamespace) -> Path:
        made = bench.tmp / "tokenizer"
        made.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (bench.world / "qwen2" / name).is_file():
                shutil.copy(bench.world / "qwen2" / name, made)
        config = json.loads((made / "tokenizer_config.json").read_text()) | changes
        for name in [name for name, value in changes.items() if value is None]:
            config.pop(name, None)
        (made / "tokenizer_config.json").write_text(json.dumps(config))
        if changes.get("chat_template", "") is None:
            (made / "chat_template.jinja").unlink()
        return made

    return make


def _with_eos(bench: SimpleNamespace, command: Command, fix: str) -> None:
    config = bench.tmp / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|im_end|>"}))


USER = "User: red\nAssistant:[[ blue{}]]".format
NO_END = LOOP.replace("BODY", "{{ m['role'] }}: {{ m['content'] }} ")
TEMPLATES = [
    Scenario(
        "two templates",
        prepare("sft", [GOOD], chat_template="chatml", input_template="{}"),
        "leave one out",
        by=without("--input-template"),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no template",
        prepare("sft", [GOOD], tokenizer=tokenizer(chat_template=None)),
        "--chat-template NAME or FILE, or --input-template .*",
        take="--chat-template NAME",
        fill=("chatml",),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no template, plain",
        prepare("sft", [GOOD], tokenizer=tokenizer(chat_template=None)),
        "--chat-template NAME or FILE, or .*",
        take=r'--input-template "User: {}\nAssistant: "',
        right=gives(USER("<|im_end|>")),
    ),
    Scenario(
        "no eos of a plain text",
        prepare("sft", [GOOD], tokenizer=tokenizer(eos_token=None), input_template="{}"),
        "set eos_token there, or --no-append-eos",
        take="--no-append-eos",
        right=gives("red[[blue]]"),
    ),
    Scenario(
        "eos of a plain text",
        prepare("sft", [GOOD], tokenizer=tokenizer(eos_token=None), input_template="{}"),
        "set eos_token there, or --no-append-eos",
        by=_with_eos,
        right=gives("red[[blue<|im_end|>]]"),
    ),
    Scenario(
        "no eos for a ready-made template",
        prepare("sft", [GOOD], tokenizer=tokenizer(eos_token=None), chat_template="plain"),
        "set eos_token in the tokenizer's configuration",
        by=_with_eos,
    ),
    Scenario(
        "other tokens for a ready-made template",
        prepare("sft", [GOOD], chat_template="gemma"),
        "--chat-template plain, or add them with tokenizer.add_special_tokens.*",
        take="--chat-template plain",
    ),
    template("refusing template", "{{ raise_exception('no') }}", "--chat-template FILE"),
    template("template that leaves out messages", "<|im_start|>x<|im_end|>", "--chat-template FILE"),
    template(
        "closing with plain text",
        LOOP.replace("BODY", TURN.replace("im_end", "eot_id")),
        "--chat-template NAME or FILE, or add it with tokenizer.add_special_tokens.*",
        take="--chat-template NAME",
        fill=("chatml",),
    ),
    template(
        "no end token",
        NO_END,
        "set eos_token in the tokenizer's configuration",
        by=then(_with_eos, setting("--chat-template", "chatml")),
        tokenizer=tokenizer(eos_token=None),
    ),
    template(
        "header in the answer",
        "{% for m in messages %}" + TURN + "{% endfor %}",
        f"mend the template, or {MARKED}".replace("{", "\\{").replace("}", "\\}"),
        by=_marked,
    ),
    template(
        "mark that is not reached",
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + LOOP.replace("BODY", TURN),
        "--chat-template FILE",
    ),
    template(
        "turns that change",
        LOOP.replace("BODY", "{{ 'x' if loop.last and m['role'] == 'user' }}" + TURN),
        MARKED.replace("{", "\\{").replace("}", "\\}"),
        by=_marked,
    ),
    template(
        "answers that change",
        LOOP.replace(
            "BODY", "{{ m['role'] }}: {{ m['content'] | upper if m['content'] == 'blue' else m['content'] }} "
        ),
        MARKED.replace("{", "\\{").replace("}", "\\}"),
        by=_marked,
    ),
    Scenario(
        "several turns of a plain text",
        prepare("sft", [{"messages": [U, B, U, A]}], input_template="{}"),
        "--chat-template FILE instead of --input-template",
        by=then(setting("--chat-template", "chatml"), without("--input-template")),
    ),
    Scenario(
        "too long",
        prepare("sft", [GOOD, {"messages": [{**U, "content": "red " * 80}, A]}], truncate="error"),
        "--truncate drop, or a larger --seq-length",
        take="--truncate drop",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "too long, longer packs",
        prepare("sft", [{"messages": [U, {**A, "content": "blue " * 40}]}], seq_length=20, truncate="error"),
        "--truncate drop, or a larger --seq-length",
        by=setting("--seq-length", "200"),
    ),
    Scenario(
        "all too long",
        prepare("sft", [GOOD], seq_length=4),
        "a larger --seq-length",
        by=setting("--seq-length", "64"),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "nothing left",
        prepare("sft", [[1]], on_bad_row="drop"),
        "check --input",
        by=rows_to(lambda r: GOOD),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "a text of one token",
        prepare("pretrain", '{"text": "red red"}\n{"text": "z"}\n', no_append_eos=""),
        "--on-empty drop",
    ),
]


def _line(number: int, text: str | None) -> Callable[[SimpleNamespace, Command, str], None]:
    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        file = bench.tmp / "rows.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        lines[number - 1 : number] = [] if text is None else [text + "\n"]
        file.write_text("".join(lines))

    return by


LINE = json.dumps(GOOD)


def _interrupted(bench: SimpleNamespace, **changes: Any) -> None:
    """The state that a killed command leaves: its work directory with one shard."""
    from mrlhf.data.prepare import workers

    plain = workers.write_shard

    def stop(*args: Any) -> None:
        plain(*args)
        raise KeyboardInterrupt

    workers.write_shard = stop
    try:
        command = prepare("sft", [GOOD], **changes)(bench)
        command.run(command)
    except KeyboardInterrupt:
        pass
    finally:
        workers.write_shard = plain


def after_interruption(command: Callable[[SimpleNamespace], Command], **changes: Any) -> Callable[[Any], Command]:
    def make(bench: SimpleNamespace) -> Command:
        _interrupted(bench, **changes)
        return command(bench)

    return make


def _run_once(command: Callable[[SimpleNamespace], Command]) -> Callable[[SimpleNamespace], Command]:
    def make(bench: SimpleNamespace) -> Command:
        first = command(bench)
        first.run(first)
        return command(bench)

    return make


def _another_process(bench: SimpleNamespace) -> Command:
    import fcntl

    folder = bench.tmp / ".out.work"
    folder.mkdir()
    bench.lock = open(folder / "lock", "ab")  # noqa: SIM115  held until the end of the scenario
    fcntl.flock(bench.lock, fcntl.LOCK_EX)
    return prepare("sft", [GOOD])(bench)


def _wait(bench: SimpleNamespace, command: Command, fix: str) -> None:
    bench.lock.close()


def _full_disk(bench: SimpleNamespace) -> Command:
    import errno

    command = prepare("sft", [GOOD])(bench)
    whole, state = command.run, {"full": True}

    def run(command: Command) -> Any:
        plain = preprocessing._assemble

        def full(*args: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        preprocessing._assemble = full if state["full"] else plain
        try:
            return whole(command)
        finally:
            preprocessing._assemble = plain

    command.run = run
    bench.disk = state
    return command


def _make_room(bench: SimpleNamespace, command: Command, fix: str) -> None:
    assert fix.endswith("then the same command with --resume")
    bench.disk["full"] = False
    command.set("--resume")


def _changing(bench: SimpleNamespace) -> Command:
    """The input grows while it is read, the first time."""
    command = prepare("sft", [GOOD])(bench)
    whole, state = command.run, {"first": True}

    def run(command: Command) -> Any:
        plain = preprocessing._assemble
        if state.pop("first", False):
            sources = preprocessing.Sources.provenance

            def changed(self: Any) -> Any:
                os.utime(bench.tmp / "rows.jsonl", ns=(1, 1))
                return sources(self)

            preprocessing.Sources.provenance = changed
            try:
                return whole(command)
            finally:
                preprocessing.Sources.provenance = sources
        preprocessing._assemble = plain
        return whole(command)

    command.run = run
    return command


def _parquet(bench: SimpleNamespace) -> Command:
    """`datasets` and pyarrow are not there the first time."""
    import sys

    command = prepare("sft", None, input=lambda bench: _saved(bench))(bench)
    whole, state = command.run, {"first": True}

    def run(command: Command) -> Any:
        if not state.pop("first", False):
            return whole(command)
        kept = sys.modules.get("datasets")
        sys.modules["datasets"] = None  # type: ignore[assignment]
        try:
            return whole(command)
        finally:
            del sys.modules["datasets"]
            if kept is not None:
                sys.modules["datasets"] = kept

    command.run = run
    return command


def _installed(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The package stands in the extra that the fix names."""
    assert "datasets" in (Path(__file__).parents[2] / "requirements/data.txt").read_text()


def _saved(bench: SimpleNamespace, *splits: str) -> str:
    import datasets

    table = datasets.Dataset.from_list([GOOD])
    folder = str(bench.tmp / "saved")
    (datasets.DatasetDict({split: table for split in splits}) if splits else table).save_to_disk(folder)
    return folder


def _to_lines(bench: SimpleNamespace, command: Command, fix: str) -> None:
    command.set("--input", str(write("lines.jsonl", LINE + "\n")(bench)))


FILES = [
    *(
        Scenario(
            name,
            prepare("sft", f"{LINE}\n{wrong}\n"),
            "mend or remove the line",
            by=_line(2, better),
            right=gives(*[CHAT("blue")] * (1 + (better is not None))),
        )
        for name, wrong, better in (
            ("no JSON", '{"messages": ', None),
            ("column twice", LINE[:-1] + ', "messages": []}', LINE),
        )
    ),
    Scenario(
        "no such file", prepare("sft", None), "check the path given to --input", by=_to_lines, right=gives(CHAT("blue"))
    ),
    Scenario(
        "pattern without a file",
        prepare("sft", [GOOD], input=lambda bench: bench.tmp / "*.json"),
        r"check the pattern given to --input \(.*\)",
        by=lambda bench, command, fix: command.set("--input", str(bench.tmp / "*.jsonl")),
        right=gives(CHAT("blue")),
    ),
    Scenario("empty file", prepare("sft", ""), "leave it out of --input", by=_to_lines, right=gives(CHAT("blue"))),
    Scenario(
        "files further down",
        prepare(
            "sft", None, input=lambda bench: write("d/e/x.jsonl.gz", gzip.compress(LINE.encode()))(bench).parents[1]
        ),
        r"--input '?/.*/d/\*\*/\*\.jsonl\.gz'?",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "directory of other files",
        prepare("sft", None, input=lambda bench: write("d/x.txt", LINE)(bench).parent),
        "--input FILE",
        by=_to_lines,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no such hub id",
        prepare("sft", None, input="no-such/thing"),
        "--input FILE",
        by=_to_lines,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "several splits",
        prepare("sft", None, input=lambda bench: _saved(bench, "test", "train")),
        "--input .*/saved:train",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "misspelt split",
        prepare("sft", None, input=lambda bench: _saved(bench, "train", "validation") + ":valid"),
        "--input .*/saved:validation",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "other split",
        prepare("sft", None, input=lambda bench: _saved(bench, "train", "test") + ":dev"),
        "--input .*/saved:SPLIT",
        by=lambda bench, command, fix: command.set("--input", fix.split()[1].replace("SPLIT", "test")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "package for a data set", _parquet, r"pip install 'mrlhf\[data\]'", by=_installed, right=gives(CHAT("blue"))
    ),
    Scenario(
        "made data as input",
        prepare("sft", None, input=lambda bench: bench.world / "sft", seq_length=160),
        "--input .*/sft.jsonl",
    ),
    Scenario(
        "a file of made data as input",
        prepare("sft", None, input=lambda bench: bench.world / "sft.bin", seq_length=160),
        "--input .*/sft.jsonl",
    ),
    Scenario(
        "no array",
        prepare("sft", None, input=write("a.json", "[" + LINE + "} ")),
        "one JSON object a line",
        by=_to_lines,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "no input",
        lambda bench: _no_input(bench),
        "--input FILE",
        by=lambda bench, command, fix: _give(bench, command),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "output exists",
        _run_once(prepare("sft", [GOOD])),
        "another --output-prefix, or --overwrite",
        take="--overwrite",
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "output exists, another",
        _run_once(prepare("sft", [GOOD])),
        "another --output-prefix, or --overwrite",
        by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "output exists for --resume",
        lambda bench: (
            _run_once(prepare("sft", [GOOD]))(bench) and prepare("sft", [GOOD], seq_length=99, resume="")(bench)
        ),
        "another --output-prefix, or --overwrite",
        take="--overwrite",
        right=gives(CHAT("blue")),
    ),
    *(
        Scenario(
            f"interrupted, {flag}",
            after_interruption(prepare("sft", [GOOD])),
            "--resume to continue it, or --overwrite to start again",
            take=flag,
            right=gives(CHAT("blue")),
        )
        for flag in ("--resume", "--overwrite")
    ),
    Scenario(
        "interrupted with other options",
        after_interruption(prepare("sft", [GOOD], resume=""), seq_length=80),
        "the same command with --resume, or --overwrite without it to start again",
        by=setting("--seq-length", "80"),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "interrupted with other options, again",
        after_interruption(prepare("sft", [GOOD], resume=""), seq_length=80),
        "the same command with --resume, or --overwrite without it to start again",
        by=then(without("--resume"), setting("--overwrite")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "two at once",
        _another_process,
        "wait until it ends, or another --output-prefix",
        by=_wait,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "two at once, another",
        _another_process,
        "wait until it ends, or another --output-prefix",
        by=lambda bench, command, fix: command.set("--output-prefix", str(bench.tmp / "b")),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "full disk",
        _full_disk,
        "make room, then the same command with --resume",
        by=_make_room,
        right=gives(CHAT("blue")),
    ),
    Scenario("input that changes", _changing, "the same command again", by=lambda *_: None, right=gives(CHAT("blue"))),
    Scenario(
        "empty split",
        prepare("sft", [GOOD], split="0.5,0.5"),
        "a larger fraction, or more data",
        by=lambda bench, command, fix: (bench.tmp / "rows.jsonl").write_text(
            "".join(json.dumps({"messages": [{**U, "content": f"red {i}"}, A]}) + "\n" for i in range(20))
        ),
    ),
]


def _no_input(bench: SimpleNamespace) -> Command:
    """From Python; the command line demands the flag."""
    values = dict(
        task="sft", tokenizer=str(bench.world / "qwen2"), output_prefix=str(bench.tmp / "out"), seq_length=64, workers=1
    )

    def run(command: Command) -> Any:
        preprocessing.preprocess(PreprocessConfig(**values, input=tuple(command.flags[1:])))
        return made(str(bench.tmp / "out"))

    return Command(run)


def _give(bench: SimpleNamespace, command: Command) -> None:
    command.set("--input", str(write("rows.jsonl", LINE + "\n")(bench)))


SCENARIOS = [*COLUMNS, *TEMPLATES, *FILES]
