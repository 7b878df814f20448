"""Random conversations x templates x tokenizers: what is trained is the last answer and the token that ends it,
and nothing else.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrlhf.data.prepare.ready_made import TEMPLATE_NAMES, ready_made
from mrlhf.data.prepare.template import Template
from mrlhf.data.tokenizers.encoder import choose_encoder

from ..chat_templates import SPECIAL

Conversation = list[dict[str, str]]
KINDS = ("bpe", "merging", "unigram", "wordpiece", "sentencepiece unigram", "sentencepiece bpe")
TRIMS = ("llama3", "gemma")
LEADS = {"mistral": " "}  # written by the model, inside the answer's turn
PIECES = [
    *SPECIAL, "<s>", "</s>", "[SEP]", "[UNK]", "<|im_", "end|>", "<|", "|>", "<", ">", "<|im_<|im_end|>end|>",
    "<|user|>\n", "[INST] ", " [/INST]", "### Response:\n", "### Instruction:\n", "User: ", "Assistant: ",
    "\nAssistant:", "assistant\n", "system", "{{ eos_token }}", "{% if %}", "that", " that", "hello", "the quick",
    "Über", "naïve", "東京", "🙂", "👩\u200d👧", "e\u0301", "\u200b", "\u00a0", "мир", "1234", "0.5", "\t", "\n",
    "\n\n", " ", "  ", "   \n", ".", "?!", "'s", "\\n", '"', "\x00", "x = [1];",
]  # fmt: skip


def conversation(pick: Callable[[list[Any]], Any]) -> Conversation:
    """Two to six turns after an optional system message; no turn is blank (the pipeline drops such rows)."""

    def text() -> str:
        made = "".join(pick(PIECES) for _ in range(pick([1, 1, 2, 3, 5, 8])))
        return made if made.strip() else made + pick(["a", "that", "🙂", "\u200b"])

    turns = [{"role": role, "content": text()} for _ in range(pick([1, 1, 2, 3])) for role in ("user", "assistant")]
    return [{"role": "system", "content": text()}, *turns] if pick([True, False, False]) else turns


class Case:
    """A tokenizer under every template, and what its own normalisation makes of a text, computed without it."""

    def __init__(self, kind: str, tokenizer: Any, sentencepiece_file: str | None):
        self.kind, self.tokenizer = kind, tokenizer
        self.templates = {
            (name, loss_on): Template(tokenizer, chat_template=ready_made(name, tokenizer), loss_on=loss_on)
            for name in TEMPLATE_NAMES
            for loss_on in ("last", "all")
        }
        self.normalizer = None
        if sentencepiece_file is not None:
            import sentencepiece

            self.normalizer = sentencepiece.SentencePieceNormalizer(model_file=sentencepiece_file)

    def decoded(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def agrees(self, all_ids: np.ndarray, at: int, stop: int, answer: str, end: str) -> bool:
        """Whether the trained `all_ids[at:stop]` are `answer` and `end`;
        the first may begin before the answer (a merge over the boundary).
        """
        ids = all_ids[at:stop]
        if self.kind == "wordpiece":  # words: the boundary is always one between words
            body = self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return ids.tolist() == body + self.tokenizer.convert_tokens_to_ids([end] if end else [])
        text = self.decoded(all_ids[:stop]).removeprefix(
            self.decoded(all_ids[:at])
        )  # alone, a text would lose its first blank
        if self.kind.startswith("sentencepiece"):  # blanks are collapsed and dropped at the ends: compare without
            plain = self.normalizer.normalize(answer).replace("▁", "").replace(" ", "")
            return text.replace(" ", "") == plain + end
        expected = (unicodedata.normalize("NFC", answer).replace("▁", " ") if self.kind == "unigram" else answer) + end
        return text.endswith(expected) and len(text) - len(expected) < max(
            1, len(self.tokenizer.convert_ids_to_tokens(ids[:1])[0])
        )

    def check(self, name: str, messages: Conversation) -> None:
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        answers = [LEADS.get(name, "") + (a.strip() if name in TRIMS else a) for a in answers]
        template = self.templates[name, "last"]
        ids, mask = template.encode([template.conversation(messages)])[0]
        shown = (self.kind, name, messages, self.decoded(ids[mask == 1]))
        assert template.end_token is not None and ids[-1] == template.end_token_id and mask[-1] == 1 and mask[0] == 0, (
            shown
        )
        assert (np.diff(mask.astype(np.int8)) != 0).sum() == 1, (
            shown
        )  # one run, at the end: everything before is untrained
        assert (ids[mask == 1] == template.end_token_id).sum() == 1, shown
        assert self.agrees(ids, int(mask.argmax()), len(ids), answers[-1], template.end_token), shown
        control = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        assert not control & set(ids[mask == 1][:-1].tolist()), (
            shown
        )  # nothing in the answer is read as a special token

        every = self.templates[name, "all"]
        ids_all, mask_all = every.encode([every.conversation(messages)])[0]
        assert np.array_equal(ids, ids_all) and (mask_all >= mask).all(), shown
        bounds = np.flatnonzero(np.diff(np.concatenate([[0], mask_all, [0]]).astype(np.int8)))
        runs = list(zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True))
        assert len(runs) == len(answers), shown
        assert all(
            self.agrees(ids_all, *run, answer, template.end_token) for run, answer in zip(runs, answers, strict=True)
        ), shown


@pytest.fixture(scope="module")
def cases(tokenizers: dict[str, Any], sentencepiece_files: dict[str, str]) -> dict[str, Case]:
    files = {f"sentencepiece {kind}": sentencepiece_files[f"{kind}_bytes"] for kind in ("unigram", "bpe")}
    return {kind: Case(kind, tokenizers[kind], files.get(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_2000_random_conversations(kind: str, cases: dict[str, Case]) -> None:
    for i in range(2100):
        cases[kind].check(TEMPLATE_NAMES[i % len(TEMPLATE_NAMES)], conversation(random.Random(i).choice))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_conversations_that_hypothesis_finds(kind: str, cases: dict[str, Case], data: st.DataObject) -> None:
    messages = conversation(lambda choices: data.draw(st.sampled_from(choices)))
    cases[kind].check(data.draw(st.sampled_from(TEMPLATE_NAMES)), messages)


def test_gigatoken_and_marks_and_rendering_differences_agree(cases: dict[str, Case]) -> None:
    """Three ways to the same ids and masks: HF, gigatoken, and the templates without their {% generation %} marks."""
    tokenizer = cases["bpe"].tokenizer
    encoder, note = choose_encoder(tokenizer, "gigatoken", [])
    assert encoder.name == "gigatoken", note
    for name in TEMPLATE_NAMES:
        marked = ready_made(name, tokenizer)
        unmarked = marked.replace("{%- generation %}", "{%- if true %}").replace("{% endgeneration %}", "{% endif %}")
        assert "generation %" not in unmarked
        for loss_on in ("last", "all"):
            hf = cases["bpe"].templates[name, loss_on]
            others = [
                Template(tokenizer, chat_template=marked, loss_on=loss_on, encoder=encoder),
                Template(tokenizer, chat_template=unmarked, loss_on=loss_on),
            ]
            talks = [conversation(random.Random(i).choice) for i in range(60)]
            expected = hf.encode([hf.conversation(t) for t in talks])
            for other in others:
                found = other.encode([other.conversation(t) for t in talks])
                for talk, one, two in zip(talks, expected, found, strict=True):
                    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)), (name, loss_on, talk)
