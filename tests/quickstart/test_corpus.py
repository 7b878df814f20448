"""The quickstart's corpus, its check of answers, its tokenizer and the way its steps are resumed."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
FILES = ("pretrain", "sft_train", "sft_eval", "pref_train", "pref_eval", "prompts_train", "prompts_eval")


def load(name: str) -> ModuleType:
    """A module of the example, whose files import each other by their bare names."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(QUICKSTART))


gold = load("gold")
corpus = load("corpus")
run = load("run")


def read(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    corpus.write_corpus(directory, seed=1, wrong_share=0.4, scale=0.25)
    return directory


def task(messages: list[dict[str, str]]) -> tuple[str, str]:
    family, argument = gold.parse(messages)
    return family.name, argument


def test_same_seed_same_files(data: Path, tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path / "again", seed=1, wrong_share=0.4, scale=0.25)
    corpus.write_corpus(tmp_path / "other", seed=2, wrong_share=0.4, scale=0.25)
    for name in FILES:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (data / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != (data / f"{name}.jsonl").read_bytes()


def test_held_out_tasks_occur_in_no_training_file(data: Path) -> None:
    held_out = {task(row["prompt"]) for name in ("pref_eval", "prompts_eval") for row in read(data, name)}
    held_out |= {task(row["messages"][:-1]) for row in read(data, "sft_eval")}
    trained = {task(row["prompt"]) for name in ("pref_train", "prompts_train") for row in read(data, name)}
    for row in read(data, "sft_train"):
        turns = row["messages"]
        trained |= {task(turns[: i + 1]) for i, turn in enumerate(turns) if turn["role"] == "user"}
    assert len(held_out) > 50
    assert not held_out & trained
    text = "".join(row["text"] for row in read(data, "pretrain"))
    for name, argument in held_out:
        for phrase in gold.FAMILIES[name].phrases:
            question = phrase.format(argument)
            assert not re.search(rf"(?<![A-Za-z]){re.escape(question)}(?![A-Z0-9])", text), question


def test_the_conversations_are_of_every_kind(data: Path) -> None:
    roles = {tuple(m["role"] for m in row["prompt"]) for row in read(data, "prompts_train")}
    assert roles == {
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
    }
    assert {task(row["prompt"])[0] for row in read(data, "prompts_eval")} == set(gold.FAMILIES)
    prompts = [json.dumps(row["prompt"]) for name in ("prompts_train", "prompts_eval") for row in read(data, name)]
    assert len(set(prompts)) == len(prompts)


def test_right_answers_score_one_and_wrong_ones_less(data: Path) -> None:
    for name in ("pref_train", "pref_eval"):
        rows = read(data, name)
        prompts = [row["prompt"] for row in rows]
        assert gold.gold_reward(prompts, [row["chosen"][0]["content"] for row in rows]) == [1.0] * len(rows)
        assert max(gold.gold_reward(prompts, [row["rejected"][0]["content"] for row in rows])) < 1
    rows = read(data, "prompts_train")
    labels = [row["label"] for row in rows]
    assert gold.gold_reward([row["prompt"] for row in rows], labels) == [1.0] * len(rows)
    assert gold.gold_reward(["not looked at"] * len(rows), labels, label=labels) == [1.0] * len(rows)


def test_every_kind_of_mistake_is_a_mistake() -> None:
    rng = corpus.random.Random(0)
    for family in gold.FAMILIES.values():
        kinds = set()
        for _ in range(300):
            argument = corpus.argument(family, rng)
            wrong = corpus.wrong_answers(family, argument, rng)
            assert family.solve(argument) not in wrong.values()
            kinds |= set(wrong)
        assert corpus.WRONG[family.name][1] in kinds


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("repeat CAB", "CAB"),
        ("write CABD backwards", "DBAC"),
        ("put CABA in order", "AABC"),
        ("what is the end of CAB?", "B"),
        ("which of 394 is the most?", "9"),
    ],
)
def test_gold_answers(question: str, answer: str) -> None:
    assert gold.right_answer([{"role": "user", "content": question}]) == answer


def test_gold_takes_only_the_result() -> None:
    prompt = [
        {"role": "user", "content": "reverse ABC"},
        {"role": "assistant", "content": "CBA"},
        {"role": "user", "content": "and DEF?"},
    ]
    given = {
        "FED": 1.0,
        " FED\n": 1.0,
        "FED<|im_end|>": 1.0,
        "FED<|im_end|><|endoftext|>": 1.0,
        "FED<|im_end|>more": 1.0,
        "FEDD": 0.0,
        "fed": 0.0,
        "the answer is FED": 0.0,
        "": 0.0,
    }
    assert gold.gold_reward([prompt] * len(given), list(given)) == list(given.values())
    with pytest.raises(ValueError, match="not one of the quickstart's tasks"):
        gold.gold_reward([[{"role": "user", "content": "hello"}]], ["x"])


def test_the_wrong_share_is_the_one_asked_for(data: Path) -> None:
    rows = read(data, "sft_train")
    scores = gold.gold_reward([row["messages"][:-1] for row in rows], [row["messages"][-1]["content"] for row in rows])
    assert sum(scores) / len(scores) == pytest.approx(0.6, abs=0.04)


def test_tokenizer(data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    load("tokenizer").write_model_directory(data, tmp_path, 512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == 512
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id in json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    # transformers replaces a pre-tokenizer that is not the architecture's own; both ways of loading must agree.
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for row in read(data, "sft_eval"):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert text.endswith("<|im_end|>") and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids) == text
        assert plain.encode(text, add_special_tokens=False) == ids
        assert len(ids) < run.PROMPT_LENGTH
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt)
    assert tokenizer.tokenize("sort CAB 19") == ["sort", "Ġ", "C", "A", "B", "Ġ", "1", "9"]
    assert tokenizer.decode(tokenizer.encode("any text: é, 中\n")) == "any text: é, 中\n"


def test_it_insists_on_the_cpu_as_the_tests_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on a machine whose GPU torch cannot use, too."""
    assert os.environ["MRLHF_DEVICE"] == "cpu"
    monkeypatch.delenv("MRLHF_DEVICE")
    assert run.environment()["MRLHF_DEVICE"] == "cpu"


def test_run_skips_resumes_and_starts_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three steps that append to a log; the second fails until `ok` exists."""
    (tmp_path / ".done").mkdir()
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "leftover").touch()

    def chain(word: str) -> list[Any]:
        def script(code: str) -> tuple[str, ...]:
            return (f"A={word} python -c \"import os, pathlib; p = pathlib.Path('{tmp_path}'); {code}\"",)

        log = "(p / 'log').open('a').write"
        return [
            run.Step("one", script(f"{log}(os.environ['A'])"), (str(tmp_path / "log"),)),
            run.Step(
                "two",
                script(
                    f"{log}('2'); (p / 'stage').mkdir(exist_ok=True); (p / 'stage' / 'half').touch(); "
                    "assert (p / 'ok').exists()"
                ),
                (),
                directory=str(tmp_path / "stage"),
            ),
            run.Step("three", script(f"{log}('3')"), ()),
        ]

    with pytest.raises(SystemExit, match="step 'two' failed with status 1"):
        run.run_steps(chain("a"), tmp_path)
    assert not (tmp_path / "stage" / "leftover").exists()
    (tmp_path / "ok").touch()
    (tmp_path / "stage" / "mine").touch()
    run.run_steps(chain("a"), tmp_path)
    assert (tmp_path / "stage" / "mine").exists(), "an interrupted step goes on from its directory"
    assert (tmp_path / "log").read_text() == "a223"
    run.run_steps(chain("a"), tmp_path)
    assert (tmp_path / "log").read_text() == "a223"
    run.run_steps(chain("b"), tmp_path)
    assert (tmp_path / "log").read_text() == "a223b23"
    assert not (tmp_path / "stage" / "mine").exists(), "another command starts anew"
    assert "finished before, skipped" in capfd.readouterr().out
