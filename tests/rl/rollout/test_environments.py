"""Conversations with an environment, against a vLLM whose words are written down beforehand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

from mrlhf.data.batching import BatchPlan
from mrlhf.errors import ConfigError, ToolError
from mrlhf.rl.rollout.environments import Environments, check_environment, load_environment_class
from mrlhf.rl.rollout.tables import Rollout, compute_tables, gather_table, micro_batches
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling

END = "<|im_end|>"
ENVIRONMENT = """
import os
import time

class Echo:
    made = 0

    def reset(self, record):
        self.label = record["label"]
        self.turn = 0
        assert "<|im_start|>user" in record["prompt"]

    def step(self, messages, text):
        self.turn += 1
        assert messages[-1] == {"role": "assistant", "content": text}, messages
        assert len(messages) == 3 * self.turn - 1
        if text == "raise":
            raise KeyError("no such tool")
        if text == "mute":
            raise Mute
        if text == "exit":
            raise SystemExit("enough")
        if text == "hang":
            time.sleep(60)
        if text == "nan":
            return {"role": "tool", "content": "x"}, float("nan"), False
        if text == "two":
            return {"role": "tool", "content": "x"}, 1.0
        if text == "words":
            return "words", 0.0, False
        if text == "listen":
            return [{"role": "tool", "content": "a <|im_end|> b"}, {"role": "user", "content": "go on"}], 0.25, False
        return {}, float(text == self.label), True

class Forks(Echo):
    def step(self, messages, text):
        with open(__file__ + ".steps", "a") as steps:
            steps.write("step\\n")
        if os.fork() == 0:
            time.sleep(0.05)
            if text == "two":
                raise KeyError("in the child")
        return {}, 1.0, True

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

class Wrong:
    def reset(self):
        pass

class Stopped(Echo):
    def step(self, messages, text):
        return (" seen:" + text, 0.5, False) if text.endswith("?") else ({}, 1.0, True)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, ["listen go on tool user assistant seen what is it"])
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("environment") / "mine.py"
    path.write_text(ENVIRONMENT)
    return path


class Scripted:
    """vLLM's place: the turns of the conversation whose prompt ends in the script's number."""

    def __init__(self, tokenizer: Any, scripts: list[list[str]]) -> None:
        self.tokenizer, self.scripts, self.calls = tokenizer, scripts, []

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, room: list[int]) -> list[Answer]:
        self.calls.append((prompts, seeds, room))
        answers = []
        for prompt, most in zip(prompts, room, strict=True):
            text = self.tokenizer.decode(prompt)
            script = self.scripts[int(text.split("user\n")[1][0])]
            turn = script[text.count("assistant\n") - 1 if END in script[0] else text.count(" seen:")]
            ids = self.tokenizer(turn, add_special_tokens=False)["input_ids"]
            answers.append(Answer(ids[:most], [-0.5] * len(ids[:most]), len(ids) <= most))
        return answers


def make(file: Path, tokenizer: Any, name: str = "Echo", **options: Any) -> Environments:
    settings = {"stop_ids": [tokenizer.eos_token_id], "max_turns": 4, "threads": 3, "timeout_s": 20.0, **options}
    return Environments(f"{file}:{name}", tokenizer, **settings)


def talk(
    file: Path, tokenizer: Any, scripts: list[list[str]], *, limit: int = 200, **options: Any
) -> tuple[list[Answer], Scripted, list[list[int]]]:
    prompts = [
        tokenizer(f"<|im_start|>user\n{i}{END}\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        for i in range(len(scripts))
    ]
    engine = Scripted(tokenizer, scripts)
    sampling = Sampling(1.0, 1.0, -1, limit, (tokenizer.eos_token_id,))
    answers = make(file, tokenizer, **options).run_conversations(
        engine, prompts, ["right"] * len(scripts), lambda i, turn: 100 * i + turn, sampling
    )
    return answers, engine, prompts


def test_turns_tokens_masks_and_rewards(file: Path, tokenizer: Any) -> None:
    scripts = [[f"listen{END}", f"right{END}"], [f"wrong{END}"], [f"listen{END}", f"listen{END}", f"right{END}"]]
    answers, engine, prompts = talk(file, tokenizer, scripts)
    assert [a.reward for a in answers] == [1.25, 0.0, 1.5]
    assert [a.turns for a in answers] == [2, 1, 3] and all(a.stopped for a in answers)
    assert [len(prompts) for prompts, _, _ in engine.calls] == [3, 2, 1], "all that go on are asked together"
    assert [seeds for _, seeds, _ in engine.calls] == [[0, 100, 200], [1, 201], [202]]
    for prompt, answer, script in zip(prompts, answers, scripts, strict=True):
        written = list(answer.tokens)
        for start, stop in reversed(answer.observed):
            del written[start:stop]
        assert tokenizer.decode(written) == "".join(script) and len(answer.logps) == len(written)
        # what the model read is what the template makes of the conversation,
        # but that the tool's text cannot close a turn
        messages = [{"role": "user", "content": tokenizer.decode(prompt).split("user\n")[1][0]}]
        for i, turn in enumerate(script):
            messages.append({"role": "assistant", "content": turn.removesuffix(END)})
            if i < len(script) - 1:
                messages += [{"role": "tool", "content": f"a {END} b"}, {"role": "user", "content": "go on"}]
        assert tokenizer.decode(prompt + answer.tokens) + "\n" == tokenizer.apply_chat_template(
            messages, tokenize=False
        )
        assert answer.tokens.count(tokenizer.eos_token_id) == len(script) + 2 * len(answer.observed)
    assert [a.observed == () for a in answers] == [False, True, False]

    rollout = Rollout(prompts, answers, [None] * 3)
    batch = micro_batches(rollout, range(3), BatchPlan(packing=True, micro_batch_size=3))[0]
    assert rollout.lengths_B().tolist() == [len(a.logps) for a in answers] == batch.sum_N(batch.mask_BT).tolist()
    values_BA = torch.arange(3 * int(rollout.lengths_B().max())).view(3, -1).float() + 1
    placed = gather_table(batch, values_BA)
    assert placed[batch.mask_BT.bool()].tolist() == [
        v for b in range(3) for v in values_BA[b, : len(answers[b].logps)].tolist()
    ]
    targets = batch.targets_BT[batch.mask_BT.bool()].tolist()
    assert tokenizer.decode(targets) == "".join(turn for script in scripts for turn in script)
    model = SimpleNamespace(forward=lambda batches, fn, channels: [placed[None]], groups=None)
    unsummed = pytest.MonkeyPatch()
    unsummed.setattr("mrlhf.rl.rollout.tables.state.sum_over_data_parallel", lambda x, of: x)
    assert torch.equal(compute_tables(model, [batch], None, shape=values_BA.shape)[0], values_BA * rollout.mask_BA())
    unsummed.undo()


def test_bounds(file: Path, tokenizer: Any) -> None:
    forever = [f"listen{END}"] * 9
    (answer,), engine, _ = talk(file, tokenizer, [forever], max_turns=3)
    assert answer.turns == 3 and len(engine.calls) == 3 and not answer.stopped and answer.reward == 0.75
    assert answer.tokens[-1] == tokenizer.eos_token_id and len(answer.observed) == 2, (
        "the last turn is not followed by an observation"
    )
    one = len(tokenizer(forever[0], add_special_tokens=False)["input_ids"])
    (answer,), _, _ = talk(file, tokenizer, [forever], limit=one + 2)
    assert answer.turns == 1 and len(answer.tokens) == one and not answer.stopped, (
        "an observation that does not fit ends it"
    )
    (answer,), _, _ = talk(file, tokenizer, [forever], limit=one - 1)
    assert answer.reward == 0 and len(answer.tokens) == one - 1, "a turn that was cut is not shown to the environment"


def test_a_stop_string_goes_on_in_the_same_turn(file: Path, tokenizer: Any) -> None:
    (answer,), engine, prompts = talk(file, tokenizer, [["what is it?", "right"]], name="Stopped")
    assert tokenizer.decode(answer.tokens) == "what is it? seen:what is it?right"
    assert answer.reward == 1.5 and len(answer.observed) == 1
    assert engine.calls[1][0] == [prompts[0] + answer.tokens[: answer.observed[0][1]]]


@pytest.mark.parametrize(
    "text,expected",
    [
        ("raise", r"KeyError: 'no such tool' \(.*mine.py:18\)"),
        ("mute", r"Mute: its text raises RuntimeError \(.*mine.py:20\)"),
        ("exit", r"SystemExit: enough \(.*mine.py:22\)"),
        ("hang", "1 of 1 conversations had no answer after 0.3 s"),
        ("nan", "reward nan"),
        ("two", "expected: \\(observation, reward, done\\)"),
        ("words", "is a string, and the model's turn is over"),
    ],
)
def test_failures_name_the_environment(file: Path, tokenizer: Any, text: str, expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(ToolError, match=expected) as error:
        talk(file, tokenizer, [[text + END, text + END]], timeout_s=0.3 if text == "hang" else 20.0)
    assert f"rollout.environment = {file}:Echo" in str(error.value)
    assert time.monotonic() - start < 18


def test_a_fork_that_comes_back_takes_no_step(file: Path, tokenizer: Any) -> None:
    scripts = [[f"listen{END}"], [f"two{END}"], [f"right{END}"]]
    answers, _, _ = talk(file, tokenizer, scripts, name="Forks", threads=1)
    assert [a.reward for a in answers] == [1.0] * 3
    for _ in scripts:
        os.wait()
    assert Path(f"{file}.steps").read_text() == "step\n" * 3


def test_what_is_no_environment_is_refused_at_the_start(file: Path, tokenizer: Any) -> None:
    def refused(call: Callable[[], object]) -> str:
        with pytest.raises(ConfigError) as error:
            call()
        return str(error.value)

    assert "path/file.py:Class" in refused(lambda: load_environment_class("mine.Echo"))
    assert "does not exist" in refused(lambda: load_environment_class("none.py:Echo"))
    assert "expected: Echo, Forks, Mute, Wrong, Stopped" in refused(lambda: load_environment_class(f"{file}:Eco"))
    assert "reset(self, record)" in refused(lambda: load_environment_class(f"{file}:Wrong"))
    assert load_environment_class("examples/calculator/calculator.py:Calculator").__name__ == "Calculator"
    assert check_environment(None, tokenizer, {}) == []
    (problem,) = check_environment(f"{file}:Echo", tokenizer, {"chat_template_sha256": "0" * 64})
    assert "another chat template" in problem.what
    assert len(check_environment(f"{file}:Nobody", tokenizer, {"chat_template_sha256": "0" * 64})) == 2


def test_the_calculator() -> None:
    environment = load_environment_class("examples/calculator/calculator.py:Calculator")()
    environment.reset({"prompt": "", "label": "4731"})
    assert environment.step([], "calc 57*83") == ({"role": "tool", "content": "4731"}, 0.0, False)
    assert environment.step([], "4731") == ({}, 1.0, True)
    assert environment.step([], "calc 57 *83")[1:] == (0.0, True)
