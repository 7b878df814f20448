"""No text of a record gets lost in a chat template, and nothing is trained that the record does not hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrlhf.commands.generate import read_prompts
from mrlhf.config.options import GenerateStage
from mrlhf.data.indexed import PackedDataset
from mrlhf.data.prepare.formats import Columns, normalise
from mrlhf.data.prepare.job import preprocess
from mrlhf.data.prepare.options import PreprocessConfig
from mrlhf.data.prepare.template import Template
from mrlhf.errors import DataError, RowProblem

from ..chat_templates import CHATML

HEAD = "{{ '<|im_start|>' + m.role + '\\n' }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def turns(body: str, before: str = "", head: str = HEAD) -> str:
    """A ChatML template with `body` as the content of each turn."""
    end = "{{ '<|im_end|>\\n' }}"
    return f"{before}{{% for m in messages %}}{head}{body}{end}{{% endfor %}}{GENERATE}"


CONTENT = "{{ m.content or '' }}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
NAMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
EACH_CALL = "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
EACH_ARGUMENT = "{% for k, v in c.function.arguments.items() %}"
LAST_REASONING = (
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
)
CUT = "{{ (m.content.split('</think>') | last) if m.role == 'assistant' and not loop.last else m.content }}"
TEMPLATES = {
    "chatml": CHATML,
    "strings only": turns("{{ m.content if m.content is string else '' }}"),
    "as text": turns("{{ m['content'] | string | trim }}"),
    "all": turns(LAST_REASONING + CONTENT + CALLS, TOOLS),
    "no tools": turns(CONTENT + CALLS),
    "tools, no calls": turns(CONTENT, TOOLS),
    "no arguments": turns(CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", NAMES),
    "calls or content": turns("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}", TOOLS),
    "python calls": turns(CONTENT + "{% for c in m.tool_calls or [] %}{{ c.function }}{% endfor %}", TOOLS),
    "printed arguments": turns(CONTENT + EACH_CALL + "({{ c.function.arguments }}){% endfor %}", TOOLS),
    "printed values": turns(CONTENT + EACH_CALL + EACH_ARGUMENT + " {{ k }}: {{ v }}{% endfor %}{% endfor %}", TOOLS),
    "python's syntax": turns(CONTENT + EACH_CALL + "(" + EACH_ARGUMENT + "{{ k }}={{ v }}{% endfor %}){% endfor %}"),
    "printed schema": turns(CONTENT, "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.parameters }}"
                            "{% endfor %}"),
    "null or call": turns("{% if m.content is none %}" + CALLS + "{% else %}{{ m.content }}{% endif %}", TOOLS),
    "three roles": turns(CONTENT, head="{% if m.role not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}"
                         + HEAD),
    "no system": turns(CONTENT, head="{% if m.role == 'system' %}{% continue %}{% endif %}" + HEAD),
    "earlier reasoning cut": turns(CUT),
    "all reasoning cut": turns("{{ (m.content.split('</think>') | last) if m.role == 'assistant' else m.content }}"),
    "first line": turns("{{ m.content.split('\\n')[0] }}"),
    "looks at numbers": turns("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x + 1 }}"
                              "{% endfor %}"),
    "name of nobody": turns("{{ m.get('name') }}: {{ m.content }}"),
}  # fmt: skip

S = {"role": "system", "content": "be brief"}
U = {"role": "user", "content": "add 1 and 2 with add in Oslo?"}
A = {"role": "assistant", "content": "3"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def call(arguments: Any, content: Any = None, name: str = "add") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def parts(*content: Any, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": list(content)}


CALL = call({"x": 1, "city": "Oslo"})
RESULT = {"role": "tool", "content": '{"sum":\n "é"}'}
TEXT = {"type": "text", "text": "3"}
THOUGHT = {"role": "assistant", "content": "3", "reasoning_content": "one and two"}
TAGGED = {"role": "assistant", "content": "<think>\none and two\n</think>\n\n3"}
LONG = {"role": "assistant", "content": "3\nand a line"}

# template, messages, tools -> the last turn as it is rendered, or the kind of the problem
CASES: list[tuple[str, list[dict[str, Any]], list[Any] | None, str]] = [
    ("chatml", [S, U, A], None, "3"),
    ("chatml", [S, U, parts(TEXT, {"type": "text", "text": "4"})], None, "34"),
    ("strings only", [U, parts(TEXT)], None, "3"),
    ("as text", [parts({"text": "hi", "type": "text", "image": None}, role="user"), parts(TEXT)], None, "3"),
    ("as text", [U, parts(TEXT, {"type": "image"})], None, "!content_part"),
    ("as text", [parts({"type": "image_url", "image_url": {"url": "x"}}, TEXT, role="user"), A], None, "!content_part"),
    ("chatml", [U, parts(7)], None, "!content_part"),
    ("chatml", [U, parts()], None, "!empty"),
    ("chatml", [{**U, "images": ["cat.png"]}, A], None, "!media"),
    ("chatml", [{**U, "images": None, "audio": []}, A], None, "3"),
    ("all", [U, CALL], [TOOL], '{"name": "add", "arguments": {"x": 1, "city": "Oslo"}}'),
    (
        "all",
        [U, call({"x": None, "y": {"z": None, "n": [None, 1]}})],
        [TOOL],
        '{"name": "add", "arguments": {"y": {"n": [null, 1]}}}',
    ),
    ("all", [U, CALL, RESULT, A], [TOOL], "3"),
    ("all", [U, call('{"x": 1}')], [TOOL], "!encoded_twice"),
    ("all", [U, call('{"city": "Oslo"}')], [TOOL], "!encoded_twice"),
    ("python calls", [U, CALL], [TOOL], "!python_repr"),
    # arguments without a text or a number
    (
        "all",
        [U, call({"on": True, "s": "", "l": []})],
        [TOOL],
        '{"name": "add", "arguments": {"on": true, "s": "", "l": []}}',
    ),
    ("no arguments", [U, call({"on": True})], [TOOL], "!tool_calls_ignored"),
    ("no arguments", [U, call({"a": {"s": ""}})], [TOOL], "!tool_calls_ignored"),
    ("no arguments", [U, call('{"on": false}')], [TOOL], "!tool_calls_ignored"),
    ("no arguments", [U, call("{}")], [TOOL], "add"),
    ("all", [U, call('{"on": true}')], [TOOL], "!encoded_twice"),
    ("all", [U, call("{}")], [TOOL], "!encoded_twice"),
    ("all", [U, call(" [] ")], [TOOL], "!encoded_twice"),
    ("printed arguments", [U, call('{"on": true}')], [TOOL], 'add({"on": true})'),
    ("printed arguments", [U, call({"on": True})], [TOOL], "!python_repr"),
    ("printed arguments", [U, call(["a"])], [TOOL], "!python_repr"),
    ("printed values", [U, call({"x": 1, "on": True})], [TOOL], "add x: 1 on: True"),
    ("printed values", [U, call({"l": ["a", "b"]})], [TOOL], "!python_repr"),
    ("printed values", [U, call({"d": {"on": True}})], [TOOL], "!python_repr"),
    ("python's syntax", [U, call({"l": ["a", "b"]})], None, "add(l=['a', 'b'])"),
    # other names, and calls that are no objects
    (
        "no arguments",
        [U, {**A, "tool_calls": [{"function": {"name": "add", "parameters": {"x": 1}}}]}],
        [TOOL],
        "!tool_calls_ignored",
    ),
    (
        "no arguments",
        [U, {**A, "tool_calls": [{"function": {"name": "add", "input": {"on": True}}}]}],
        [TOOL],
        "!tool_calls_ignored",
    ),
    ("all", [U, {**A, "tool_calls": json.dumps(CALL["tool_calls"])}], [TOOL], "!call_type"),
    ("all", [U, {**A, "tool_calls": {"name": "add"}}], [TOOL], "!call_type"),
    ("all", [U, {**A, "tool_calls": ['{"name": "add"}']}], [TOOL], "!call_type"),
    ("all", [U, {**A, "tool_calls": [{"function": "add"}]}], [TOOL], "!call_type"),
    ("all", [U, {**A, "function_call": "add(1)"}], [TOOL], "!call_type"),
    (
        "all",
        [U, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}],
        [TOOL],
        "!tool_calls_ignored",
    ),
    # tools without a name, and a schema as Python's repr
    ("chatml", [U, A], [{"type": "web_search"}], "!tools_ignored"),
    ("all", [U, A], [{"type": "web_search"}], "3"),
    ("printed schema", [U, A], [TOOL], "!python_repr"),
    ("no tools", [U, CALL], [TOOL], "!tools_ignored"),
    ("tools, no calls", [U, CALL], [TOOL], "!tool_calls_ignored"),
    ("tools, no calls", [U, call({"x": 1}, "I add")], [TOOL], "!tool_calls_ignored"),
    ("tools, no calls", [U, CALL, RESULT, A], [TOOL], "!tool_calls_ignored"),
    ("no arguments", [U, CALL], [TOOL], "!tool_calls_ignored"),
    ("no arguments", [U, call({})], [TOOL], "add"),
    ("calls or content", [U, call({"x": 1}, "I add")], [TOOL], "!turn_ignored"),
    ("null or call", [U, call({"x": 1})], [TOOL], '{"name": "add", "arguments": {"x": 1}}'),
    ("null or call", [U, call({"x": 1}, "I add")], [TOOL], "!tool_calls_ignored"),
    ("as text", [U, CALL], None, "!tool_calls_ignored"),
    ("chatml", [U, CALL], None, "!tool_calls_ignored"),
    ("chatml", [U, {**A, "function_call": {"name": "add", "arguments": "{}"}}], None, "!tool_calls_ignored"),
    ("looks at numbers", [U, call({"x": 1}, "", "multiply")], None, "!tool_calls_ignored"),
    ("name of nobody", [U, A], None, "!null_rendered"),
    ("name of nobody", [{**U, "name": "None"}, {**A, "name": "ann"}], None, "ann: 3"),
    ("three roles", [{"role": "developer", "content": "be brief"}, U, A], None, "!turn_ignored"),
    ("three roles", [U, A, {"role": "observation", "content": "3"}, A], None, "!turn_ignored"),
    ("no system", [S, U, A], None, "!turn_ignored"),
    ("no system", [{"role": "system", "content": " "}, U, A], None, "3"),
    ("no system", [{"role": "system", "content": None}, U, A], None, "3"),
    ("all", [U, THOUGHT], None, "<think>one and two</think>3"),
    ("all", [U, THOUGHT, U, A], None, "3"),
    ("all", [U, THOUGHT, U, THOUGHT], None, "<think>one and two</think>3"),
    ("chatml", [U, THOUGHT], None, "!reasoning_ignored"),
    ("chatml", [U, {**A, "thinking": "one and two", "reasoning": None}], None, "!reasoning_ignored"),
    ("earlier reasoning cut", [U, TAGGED, U, TAGGED], None, "<think>\none and two\n</think>\n\n3"),
    ("chatml", [U, {**A, "tool_plan": "one and two"}], None, "!reasoning_ignored"),
    ("chatml", [U, {**A, "reasoning_content": ["one", "two"]}], None, "!reasoning_type"),
    ("all reasoning cut", [U, TAGGED], None, "!reasoning_ignored"),
    ("first line", [U, A], None, "3"),
    ("first line", [U, LONG], None, "!turn_ignored"),
    ("first line", [{**U, "content": "a\nb"}, A], None, "!turn_ignored"),
]


@pytest.mark.parametrize(("name", "messages", "tools", "expected"), CASES)
def test_everything_stands_or_the_row_is_a_problem(name: str, messages: list[Any], tools: Any, expected: str,
                                                   load: Callable[[str], Any], bpe_dir: str) -> None:  # fmt: skip
    template = Template(load(bpe_dir), chat_template=TEMPLATES[name])
    record = {"messages": messages, "tools": tools}
    answers = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [{"role": "assistant", "content": "no"}],
               "tools": tools}  # fmt: skip
    for _ in range(2):  # the second time from the known shapes
        for task, row in (("sft", record), ("preference", answers)):
            if expected.startswith("!"):
                with pytest.raises(RowProblem) as caught:
                    sample = normalise(row, task, Columns(), plain=False)
                    for conversation in sample.conversations:
                        template.conversation(conversation, tools=sample.tools)
                assert caught.value.kind == expected[1:] and caught.value.fix
                continue
            sample = normalise(row, task, Columns(), plain=False)
            rendered = template.conversation(sample.conversations[0], tools=sample.tools)
            ((start, end),) = rendered.trained
            assert rendered.text[start:end] == expected + "<|im_end|>" and "None" not in rendered.text.replace(
                "None:", ""
            )


@pytest.mark.parametrize(
    ("name", "messages", "tools", "kind"),
    [
        ("three roles", [{"role": "human", "content": "hi"}, U], None, "turn_ignored"),
        ("no system", [S, U], None, "turn_ignored"),
        ("no tools", [U], [TOOL], "tools_ignored"),
        ("tools, no calls", [U, CALL, RESULT], [TOOL], "tool_calls_ignored"),
        ("first line", [{**U, "content": "a\nb"}], None, "turn_ignored"),
        ("all", [U, THOUGHT, U], None, None),
        ("all reasoning cut", [U, TAGGED, U], None, None),
        ("all", [U, CALL, RESULT], [TOOL], None),
    ],
)
def test_prompts(name: str, messages: list[Any], tools: Any, kind: str | None, load: Any, bpe_dir: str) -> None:
    template = Template(load(bpe_dir), chat_template=TEMPLATES[name])
    sample = normalise({"prompt": messages, "tools": tools}, "prompts", Columns(), plain=False)
    if kind is None:
        assert template.prompt(sample.prompt, tools=sample.tools).text.endswith("assistant\n")
        return
    with pytest.raises(RowProblem) as caught:
        template.prompt(sample.prompt, tools=sample.tools)
    assert caught.value.kind == kind


def test_generate_renders_tools_as_preprocessing_does(jsonl: Callable[..., str], load: Any,
                                                      bpe_dir: str) -> None:  # fmt: skip
    config = GenerateStage(checkpoint="c", prompts=jsonl([{"prompt": "add", "tools": [TOOL]}]), output="out")
    tokenizer = copy.copy(load(bpe_dir))
    tokenizer.chat_template = TEMPLATES["all"]
    (row,) = read_prompts(config, tokenizer, limit=500)
    sample = Template(tokenizer).prompt([{"role": "user", "content": "add"}], tools=[TOOL])
    assert row.ids == Template(tokenizer).encode([sample])[0][0].tolist()
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError, match="the row has tools"):
        read_prompts(config, tokenizer, limit=500)


def test_every_trained_turn_keeps_its_reasoning(load: Any, bpe_dir: str) -> None:
    template = Template(load(bpe_dir), chat_template=TEMPLATES["earlier reasoning cut"], loss_on="all")
    with pytest.raises(RowProblem) as caught:
        template.conversation([U, TAGGED, U, A])
    assert caught.value.kind in ("reasoning_ignored", "template_prefix")


def test_an_answer_of_an_end_token_alone(load: Any, bpe_dir: str) -> None:
    marks = turns("{% if m.role == 'assistant' %}{{ m.content }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
                  "{% else %}{{ m.content }}{% endif %}")  # fmt: skip
    with pytest.raises(RowProblem, match="nothing of the answer but its end token"):
        Template(load(bpe_dir), chat_template=marks).conversation([U, A])


def test_texts_that_look_like_special_tokens_stand_too(load: Any, bpe_dir: str) -> None:
    chat = [{**U, "content": "<|im_end|> and <|im_start|>"}, {**A, "content": "<|im_end|>"}]
    text = Template(load(bpe_dir), chat_template=CHATML).conversation(chat).text
    assert text.endswith("assistant\n<|im_end|><|im_end|>")


@pytest.mark.parametrize("key", ["system", "system_prompt", "history", "functions", "images", "video", "documents"])
def test_a_column_that_would_be_left_out(key: str) -> None:
    rows = {
        "sft": {"messages": [U, A]},
        "prompts": {"prompt": [U]},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    }
    for task, row in rows.items():
        for value in ("text", ["x"], {"bytes": "x"}):
            for plain in (False, True):
                with pytest.raises(RowProblem, match=f"column '{key}' is .* left out"):
                    normalise({**row, key: value}, task, Columns(), plain=plain)
        for nothing in (None, "", " ", [], {}, 7):
            normalise({**row, key: nothing}, task, Columns(), plain=False)
    normalise({"input": "be brief: hi", "output": "a", key: "be brief"}, "sft", Columns(), plain=True)
    normalise({"prompt": "be brief: hi", key: "be brief"}, "prompts", Columns(), plain=True)
    normalise(
        {"messages": [{"role": "system", "content": " be brief"}, U, A], "system": "be brief"},
        "sft",
        Columns(),
        plain=False,
    )


def test_a_plain_template_refuses_what_it_cannot_render() -> None:
    for message in ({**A, "reasoning": "r"}, call({}, "3"), {**A, "function_call": {"name": "add"}}):
        with pytest.raises(RowProblem, match="which a plain --input-template leaves out"):
            normalise({"messages": [U, message]}, "sft", Columns(), plain=True)


@pytest.mark.parametrize("margin", [1e39, -1e39, 10**400, float("nan")])
def test_margins_that_float32_does_not_hold(margin: float) -> None:
    with pytest.raises(RowProblem, match="column 'margin'"):
        normalise(
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}, "preference", Columns(), plain=False
        )


def make(task: str, path: Path, tokenizer: str, **options: Any) -> PackedDataset:
    prefix = str(path.with_suffix(""))
    preprocess(PreprocessConfig(task=task, input=(str(path),), tokenizer=tokenizer, output_prefix=prefix,
                                seq_length=256, workers=1, tokenizer_backend="hf", **options))  # fmt: skip
    return PackedDataset.open(prefix)


def test_nulls_that_parquet_adds_are_left_out(tmp_path: Path, load: Any, bpe_dir: str) -> None:
    import pyarrow
    import pyarrow.parquet

    def tool(name: str, key: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}

    rows = [
        {"messages": [U, call({key: "v"}, "", name)], "tools": [tool(name, key)]}
        for name, key in (("f", "a"), ("g", "b"))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "t.jinja").write_text(TEMPLATES["all"])
    data = make("sft", tmp_path / "x.parquet", bpe_dir, chat_template=str(tmp_path / "t.jinja"), pack=False)
    texts = [load(bpe_dir).decode(data.sample(i)[1]) for i in range(2)]
    for text, row in zip(texts, rows, strict=True):
        assert json.dumps(row["tools"]) in text and json.dumps(row["messages"][1]["tool_calls"][0]["function"]) in text
        assert "null" not in text


def test_equal_pairs_are_dropped_and_counted(jsonl: Callable[..., str], bpe_dir: str) -> None:
    rows = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "yes " * 400 + "a", "rejected": "yes " * 400 + "b"}]  # fmt: skip
    data = make("preference", Path(jsonl(rows)), bpe_dir, truncate="right")
    assert data.num_samples == 2 and data.meta["drops"] == {"equal_after_the_cut": 1, "equal_pair": 1}


def test_prompts_without_a_token(tmp_path: Path, jsonl: Callable[..., str]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({"y": 0, "</s>": 1}, []))  # drops what it does not know
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>").save_pretrained(tmp_path / "t")
    with pytest.raises(DataError, match="gives no token"):
        make("prompts", Path(jsonl([{"prompt": "hello"}])), str(tmp_path / "t"), input_template="{}")
