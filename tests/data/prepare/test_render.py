"""Our rendering is transformers' rendering: texts and {% generation %} spans,
for the templates that come with mrlhf and others.
"""

from __future__ import annotations

import pickle
import random
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mrlhf.data.prepare import render
from mrlhf.data.prepare.ready_made import TEMPLATE_NAMES, ready_made
from mrlhf.data.prepare.render import ChatTemplate
from mrlhf.data.prepare.template import Template
from mrlhf.errors import DataError, RowProblem

from ..chat_templates import TEMPLATES
from .test_template_properties import conversation

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds <b>&</b> é", "parameters": {"type": "object"}},
    }
]
WITH_TOOLS = (
    "{{ strftime_now('%Y') }}{%- if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson(indent=2) + "
    "'<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' and loop.last and m.content == 'stop' %}{% break %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m['content'] }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MACRO = (
    "{% macro turn(m) %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endmacro %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ turn(m) }}\n{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "Yes.\n"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


def test_texts_and_spans_are_those_of_transformers(tokenizers: dict[str, Any]) -> None:
    for tokenizer in (tokenizers["bpe"], tokenizers["unigram"]):
        sources = {**TEMPLATES, "tools": WITH_TOOLS, **{name: ready_made(name, tokenizer) for name in TEMPLATE_NAMES}}
        for name, source in sources.items():
            ours = pickle.loads(pickle.dumps(ChatTemplate(source, tokenizer.special_tokens_map)))
            for i in range(40):
                messages = conversation(random.Random(i).choice)
                tools = TOOLS if i % 2 else None
                for part, add in ((messages, False), (messages[:-1], True)):
                    text, spans = ours.render(part, tools=tools, add_generation_prompt=add)
                    expected = tokenizer.apply_chat_template(
                        part, chat_template=source, tools=tools, tokenize=False, add_generation_prompt=add
                    )
                    assert text == expected, (name, part)
                    marks = render_jinja_template(
                        [part],
                        chat_template=source,
                        return_assistant_tokens_mask=True,
                        add_generation_prompt=add,
                        tools=tools,
                        **tokenizer.special_tokens_map,
                    )[1][0]
                    assert spans == marks, (name, part)


def test_marks_in_a_macro_are_found_too(tokenizers: dict[str, Any]) -> None:
    """transformers counts them from the text before the macro's call, and so gets them wrong."""
    text, spans = ChatTemplate(MACRO, {}).render(CHAT)
    assert [text[s:e] for s, e in spans] == ["Yes.\n<|im_end|>", "So.<|im_end|>"]
    template = Template(tokenizers["bpe"], chat_template=MACRO)
    ids, mask = template.encode([template.conversation(CHAT)])[0]
    assert template.tokenizer.decode(ids[mask == 1]) == "So.<|im_end|>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for %}",
        "{{ messages[9].content }}",
    ],
)
def test_templates_that_fail_or_leave_the_sandbox_are_row_problems(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(RowProblem, match="the chat template refuses"):
        template.render(CHAT)


LOOPS = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "loops that only look": (
        "{% set n = namespace(x=0) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set n.x = n.x + 1 %}"
        "{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(99) }}"
    ),
    "filters": "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "generation": (
        "{% generation %}{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}"
        "{% endgeneration %}"
    ),
}


BOMBS = {
    "one that doubles": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a filter": "{{ 'x' | center(10 ** 11) }}",
    "a product": "{{ 'x' * 10 ** 11 }}",
    "a format": "{{ '{:>99999999999}'.format(1) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is RLIMIT_AS of what /proc/self/statm says")
def test_templates_that_take_all_memory_are_ended(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LIMIT_BYTES", 64 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    for name, source in BOMBS.items():
        with pytest.raises(
            DataError, match=r"models/x: its chat template took more than 64 MiB on \['system'"
        ) as caught:
            ChatTemplate(source, {}, where="models/x").render(CHAT)
        assert not isinstance(caught.value, RowProblem), name
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(DataError, match=f"{tokenizers['bpe'].name_or_path}.*took more than"):
        Template(tokenizers["bpe"], chat_template=BOMBS["one that doubles"])


def test_templates_that_do_not_end_are_ended(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by where they come from; not a problem of the row, or the next row would be another wait."""
    monkeypatch.setattr(render, "LIMIT_S", 0.05)
    for source in LOOPS.values():
        with pytest.raises(
            DataError, match=r"models/x: its chat template did not end within 0\.05 s on \['system'"
        ) as caught:
            ChatTemplate(source, {}, where="models/x").render(CHAT)
        assert not isinstance(caught.value, RowProblem)
        with pytest.raises(DataError, match=f"{tokenizers['bpe'].name_or_path}.*did not end"):
            Template(tokenizers["bpe"], chat_template=source)
    squares = "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}"
    for source in ("{{ 10 ** (10 ** 9) }}", squares, "{{ range(10 ** 9) }}"):
        with pytest.raises(RowProblem, match="more than 10,000 bits|Range too big"):
            ChatTemplate(source, {}).render(CHAT)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    in_a_thread = ThreadPoolExecutor(1).submit(
        ChatTemplate("{% for m in messages %}{{ 3 * m.content + '!' * 2 }}{% endfor %}", {}).render, CHAT[:1]
    )
    assert in_a_thread.result() == ("Be brief.Be brief.Be brief.!!", [])


SYSTEM_TWO_TURNS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\nYes.\n"
    "<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>",
    "mistral": "[INST] Be brief.\n\n hi  [/INST] Yes.\n<|endoftext|>[INST] Why? [/INST] So.<|endoftext|>",
    "gemma": "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n"
    "<start_of_turn>model\nSo.<end_of_turn>",
    "zephyr": "<|system|>\nBe brief.<|endoftext|>\n<|user|>\n hi <|endoftext|>\n<|assistant|>\nYes.\n<|endoftext|>\n"
    "<|user|>\nWhy?<|endoftext|>\n<|assistant|>\nSo.<|endoftext|>",
    "alpaca": (
        "Be brief.\n\n### Instruction:\n hi \n\n### Response:\nYes.\n<|endoftext|>\n\n### Instruction:\nWhy?\n\n"
        "### Response:\nSo.<|endoftext|>"
    ),
    "plain": "System: Be brief.\nUser:  hi \nAssistant: Yes.\n<|endoftext|>\nUser: Why?\nAssistant: So.<|endoftext|>",
}
GENERATION_PROMPTS = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[/INST]",
    "gemma": "<start_of_turn>model\n",
    "zephyr": "<|assistant|>\n",
    "alpaca": "### Response:\n",
    "plain": "Assistant: ",
}


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_ready_made_templates(name: str, tokenizers: dict[str, Any]) -> None:
    template = Template(tokenizers["bpe"], chat_template=ready_made(name, tokenizers["bpe"]), loss_on="all")
    rendered = template.conversation(CHAT)
    assert rendered.text == SYSTEM_TWO_TURNS[name]
    lead = " " if name == "mistral" else ""
    first = "Yes." if name in ("llama3", "gemma") else "Yes.\n"
    assert [rendered.text[s:e] for s, e in rendered.trained] == [lead + a + template.end_token for a in (first, "So.")]
    prompt = template.prompt(CHAT[:-1]).text
    assert prompt.endswith(GENERATION_PROMPTS[name]) and rendered.text == prompt + lead + "So." + template.end_token
    assert template.conversation(CHAT[1:]).text != rendered.text  # works without a system turn


@pytest.mark.parametrize("name", ["mistral", "gemma", "alpaca"])
def test_orders_that_the_original_refuses(name: str, tokenizers: dict[str, Any]) -> None:
    template = Template(tokenizers["bpe"], chat_template=ready_made(name, tokenizers["bpe"]))
    user, assistant, system = CHAT[1], CHAT[2], CHAT[0]
    for wrong in (
        [user, user, assistant],
        [assistant, user, assistant],
        [user, system, assistant],
        [system, assistant],
        [user, assistant, assistant],
    ):
        with pytest.raises(RowProblem, match="alternate|only the roles"):
            template.conversation(wrong)
    with pytest.raises(RowProblem):
        template.conversation([user, {"role": "tool", "content": "7"}])


def test_ready_made_templates_need_their_special_tokens(
    tokenizers: dict[str, Any], sentencepiece_files: dict[str, str], load: Any
) -> None:
    bare = load(sentencepiece_files["unigram"])  # <s> and </s> only
    for name in ("mistral", "zephyr", "alpaca", "plain"):
        assert Template(bare, chat_template=ready_made(name, bare)).end_token == "</s>"
    for name, missing in (("chatml", "<|im_start|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")):
        with pytest.raises(DataError, match="as ordinary text") as caught:
            ready_made(name, bare)
        assert missing in str(caught.value)
    with pytest.raises(
        DataError, match="closes turns with '<|im_end|>', which is no special token".replace("|", r"\|")
    ):
        Template(bare, chat_template=TEMPLATES["chatml"])


def test_tools_reach_the_template_or_are_refused(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bpe"]
    template = Template(tokenizer, chat_template=WITH_TOOLS)
    messages = [
        CHAT[1],
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "2"},
        CHAT[4],
    ]
    expected = tokenizer.apply_chat_template(messages, chat_template=WITH_TOOLS, tools=TOOLS, tokenize=False)
    assert expected.startswith(template.conversation(messages, tools=TOOLS).text) and "adds <b>&</b> é" in expected
    assert "Tools:" in template.prompt(messages[:1], tools=TOOLS).text
    for other in (Template(tokenizer), Template(tokenizer, input_template="{}")):
        with pytest.raises(RowProblem, match="would leave out"):
            other.prompt("hi", tools=TOOLS)
