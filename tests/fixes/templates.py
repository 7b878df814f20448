"""Fixes of tools/preprocess_data.py that speak of templates, and of samples that come out empty or too long."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .harness import By, Command, Scenario
from .rows import CHAT, GOOD, A, B, U, gives, prepare, rows_to, setting, then, without, write


def template(
    name: str,
    source: str,
    fix: str,
    *,
    rows: Any = GOOD,
    take: str | None = None,
    fill: tuple[Any, ...] = (),
    by: Any = None,
    right: Any = None,
    **changes: Any,
) -> Scenario:
    """One that the chat template `source` causes; a good one is at GOOD."""

    def with_good(bench: SimpleNamespace, command: Command, fix: str) -> None:
        command.set("--chat-template", "chatml")

    values = {"chat_template": write("template.jinja", source), "seq_length": 256} | changes
    return Scenario(
        name,
        prepare("sft", [rows], **values),
        fix,
        take=take,
        fill=fill,
        by=by or with_good,
        right=right or gives(CHAT("blue")),
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
FILE, LEFT_OUT = "--chat-template FILE", "--chat-template FILE, or remove it from the data"
FILTER = r"--chat-template FILE \(its filter tojson\)"
STRINGS = f"{FILTER}, or arguments as JSON strings"
KIND, SYSTEM = {"role": "system", "content": "be kind"}, "<|im_start|>system\nbe kind<|im_end|>\n"
NAMED = LOOP.replace("BODY", TURN.replace("\n{{", "\n{{ m.get('name') }}: {{"))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}"
SHOWN = json.dumps([TOOL]) + "\n"
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"x": "y"}}}], "content": None}
CALLING = {"messages": [U, CALL], "tools": [TOOL]}
NOTHING, MERGED = {"messages": [U, {**A, "content": "zz"}]}, {"input": "re", "output": "d"}
BARE, ENDLESS = {"input_template": "{}"}, {"input_template": "{} ", "no_append_eos": ""}


def _called(call: str) -> str:
    return SHOWN + CHAT(call)


def _turn(call: str) -> str:
    content = "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"
    return TURN.replace("{{ m['content'] }}", content)


def _arguments(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(record: Any) -> Any:
        record = json.loads(json.dumps(record))
        function = record["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = change(function["arguments"])
        return record

    return changed


def _calls(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(record: Any) -> Any:
        user, answer = record["messages"]
        return {**record, "messages": [user, {**answer, "tool_calls": [change(c) for c in answer["tool_calls"]]}]}

    return changed


def _file(source: str) -> By:
    return lambda bench, command, fix: command.set("--chat-template", str(write("other.jinja", source)(bench)))


def _changed_tokenizer(change: Callable[[Any], Any]) -> Callable[[SimpleNamespace], Path]:
    def make(bench: SimpleNamespace) -> Path:
        path = tokenizer()(bench) / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return path.parent

    return make


def _worlds(bench: SimpleNamespace, command: Command, fix: str) -> None:
    command.set("--tokenizer", str(bench.world / "qwen2"))


def _only_alone(content: Any) -> None:
    """The end token is none behind a letter."""
    next(token for token in content["added_tokens"] if token["content"] == "<|im_end|>")["single_word"] = True


_end_as_text = _changed_tokenizer(_only_alone)
_without_z = _changed_tokenizer(
    lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": "z"}, "content": ""})
)
SCENARIOS = [
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
    # ---- what a template leaves out or renders wrongly
    template(
        "template without systems",
        LOOP.replace("BODY", "{% if m['role'] != 'system' %}" + TURN + "{% endif %}"),
        LEFT_OUT,
        rows={"messages": [KIND, U, A]},
        take=FILE,
        fill=("chatml",),
        right=gives(SYSTEM + CHAT("blue")),
    ),
    template(
        "template without systems, removed",
        LOOP.replace("BODY", "{% if m['role'] != 'system' %}" + TURN + "{% endif %}"),
        LEFT_OUT,
        rows={"messages": [KIND, U, A]},
        by=rows_to(lambda r: GOOD),
    ),
    template(
        "template without tools",
        LOOP.replace("BODY", _turn("{{ c.function | tojson }}")),
        f"{FILE}, or remove the column",
        rows=CALLING,
        by=_file(TOOLS + LOOP.replace("BODY", _turn("{{ c.function | tojson }}"))),
        right=gives(_called('{"name": "add", "arguments": {"x": "y"}}')),
    ),
    template(
        "template without tools, removed",
        LOOP.replace("BODY", TURN),
        f"{FILE}, or remove the column",
        rows={**GOOD, "tools": [TOOL]},
        by=rows_to(lambda r: {"messages": r["messages"]}),
    ),
    *(
        template(
            f"{name} as Python writes it",
            before + LOOP.replace("BODY", _turn(call)),
            fix,
            rows=CALLING,
            by=_file(TOOLS + LOOP.replace("BODY", _turn("{{ c.function | tojson }}"))),
            right=gives(_called('{"name": "add", "arguments": {"x": "y"}}')),
        )
        for name, before, call, fix in (
            ("call", TOOLS, "{{ c.function }}", FILTER),
            ("tools", TOOLS.replace(" | tojson", ""), "{{ c.function | tojson }}", FILTER),
            ("arguments", TOOLS, "{{ c.function.name }} {{ c.function.arguments }}", STRINGS),
        )
    ),
    template(
        "arguments as JSON strings",
        TOOLS + LOOP.replace("BODY", _turn("{{ c.function.name }} {{ c.function.arguments }}")),
        STRINGS,
        rows=CALLING,
        by=rows_to(_arguments(json.dumps)),
        right=gives(_called('add {"x": "y"}')),
    ),
    template(
        "calls that are JSON strings",
        TOOLS + LOOP.replace("BODY", _turn("{{ c.function | tojson }}")),
        "parse it in the data, where it is a JSON string",
        rows=_calls(json.dumps)(CALLING),
        by=rows_to(_calls(json.loads)),
        right=gives(_called('{"name": "add", "arguments": {"x": "y"}}')),
    ),
    template(
        "arguments that are JSON already",
        TOOLS + LOOP.replace("BODY", _turn("{{ c.function | tojson }}")),
        "parse the arguments in the data, or --chat-template FILE",
        rows=_arguments(json.dumps)(CALLING),
        by=rows_to(_arguments(json.loads)),
        right=gives(_called('{"name": "add", "arguments": {"x": "y"}}')),
    ),
    template(
        "arguments that are JSON already, another template",
        TOOLS + LOOP.replace("BODY", _turn("{{ c.function | tojson }}")),
        "parse the arguments in the data, or --chat-template FILE",
        rows=_arguments(json.dumps)(CALLING),
        by=_file(TOOLS + LOOP.replace("BODY", _turn("{{ c.function.name }} {{ c.function.arguments }}"))),
        right=gives(_called('add {"x": "y"}')),
    ),
    template(
        "name of nobody",
        NAMED,
        "mend the data, or --chat-template FILE",
        by=rows_to(lambda r: {"messages": [{**m, "name": "ann"} for m in r["messages"]]}),
        right=gives(CHAT("ann: blue").replace("\nred", "\nann: red")),
    ),
    template("name of nobody, another template", NAMED, "mend the data, or --chat-template FILE"),
    *(
        Scenario(
            f"tools in a plain text{name}",
            prepare("sft", [{**GOOD, "tools": [TOOL]}], input_template="{} ", seq_length=256),
            "--chat-template FILE instead of --input-template, or remove the column",
            by=by,
            right=gives(sample),
        )
        for name, by, sample in (
            ("", then(_file(TOOLS + LOOP.replace("BODY", TURN)), without("--input-template")), SHOWN + CHAT("blue")),
            (", removed", rows_to(lambda r: {"messages": r["messages"]}), "red[[ blue<|im_end|>]]"),
        )
    ),
    template(
        "answers that change without an end",
        "{% for m in messages %}{{ m['content'] | upper if m['content'] == 'blue' else m['content'] }}{% endfor %}",
        MARKED.replace("{", "\\{").replace("}", "\\}"),
        by=_marked,
    ),
    template(
        "nothing but reasoning",
        LOOP.replace("BODY", TURN.replace("m['content']", "(m['content'].split('</think>') | last)")),
        FILE,
        rows={"messages": [U, {**A, "content": "<think></think>"}]},
        right=gives(CHAT("<think></think>")),
    ),
    # ---- texts that the tokenizer has no tokens for
    *(
        Scenario(
            f"{name} of no tokens{', another tokenizer' * (by is not None)}",
            prepare(task, [wrong] if by else [wrong, good], tokenizer=_without_z, **changes),
            f"{drop}, or another --tokenizer",
            take=None if by else drop,
            by=by,
            right=gives(sample),
        )
        for name, task, wrong, good, changes, drop, by, sample in (
            ("a prompt", "prompts", {"prompt": "zz"}, {"prompt": "red"}, BARE, "--on-empty drop", None, "red"),
            ("a prompt", "prompts", {"prompt": "zz"}, None, BARE, "--on-empty drop", _worlds, "zz"),
            ("an answer", "sft", NOTHING, GOOD, ENDLESS, "--on-bad-row drop", None, "red[[ blue]]"),
            ("an answer", "sft", NOTHING, None, ENDLESS, "--on-bad-row drop", _worlds, "red [[zz]]"),
        )
    ),
    *(
        Scenario(
            f"a prompt that {verb} its answer",
            prepare("sft", rows, tokenizer=tokenizer_, input_template="{}"),
            r"--input-template with text behind \{\}, or --on-bad-row drop",
            by=by,
            right=gives(sample),
        )
        for verb, rows, tokenizer_, by, sample in (
            ("merges with", [MERGED], tokenizer(), setting("--input-template", "{}: "), "re: [[d<|im_end|>]]"),
            (
                "is nothing before",
                [MERGED, GOOD],
                tokenizer(),
                setting("--on-bad-row", "drop"),
                "red[[blue<|im_end|>]]",
            ),
        )
    ),
    template(
        "everything marked",
        "{% generation %}{% for m in messages %}" + TURN + "{% endfor %}{% endgeneration %}",
        FILE,
    ),
    template(
        "end token in several",
        LOOP.replace("BODY", TURN),
        "another --tokenizer, or --chat-template FILE with another end token",
        by=_worlds,
        tokenizer=_end_as_text,
    ),
]
