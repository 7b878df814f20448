from __future__ import annotations

import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from mrlhf.errors import ConfigError, RewardError
from mrlhf.rl.rewards.kinds import (
    RewardSource,
    check_scores,
    load_function,
    name_sources,
    parse_source,
    score_with_function,
)
from mrlhf.rl.rewards.sources import Rewards
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.rollout.vllm_engine import Answer

EXAMPLES = Path(__file__).parents[3] / "examples" / "rewards"


class TestParseSource:
    def test_the_three_forms(self):
        assert parse_source("rewards/a.py:score") == RewardSource("function", "rewards/a.py:score", 1.0)
        assert parse_source(" model:checkpoints/rm ", weight=0.5) == RewardSource("model", "checkpoints/rm", 0.5)
        assert parse_source("http://a:5000/s,https://b/s").urls == ["http://a:5000/s", "https://b/s"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a.py",
            "a.py:",
            "a.txt:f",
            "a.py:not a name",
            "model:",
            "http://",
            "http://a:port/s",
            "http://a/s,b/s",
            "ftp://a/s",
            "http://me:secret@a/s",
            "http://a/s?n=1&api_key=secret",
        ],
    )
    def test_other_texts_are_refused(self, text):
        with pytest.raises(ConfigError) as caught:
            parse_source(text)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("weight", [math.nan, math.inf, True, "1"])
    def test_wrong_weights_are_refused(self, weight):
        with pytest.raises(ConfigError, match="weight"):
            parse_source("model:rm", weight=weight)


class TestNames:
    @pytest.mark.parametrize(
        "texts,names",
        [
            (["rw/a/rew.py:rew", "rw/b/rew.py:rew"], ["function:a/rew.py:rew", "function:b/rew.py:rew"]),
            (["rew.py:rew", "b/rew.py:rew"], ["function:rew.py:rew", "function:b/rew.py:rew"]),
            (["x/rew.py:f", "x/rew.py:g"], ["function:rew.py:f", "function:rew.py:g"]),
            (["http://a:1/score", "http://b:1/score"], ["http:a:1/score", "http:b:1/score"]),
            (["http://a/s,http://b/s", "http://c/s"], ["http:b/s", "http:c/s"]),
            (["model:x/hf", "model:y/hf/", "model:z/rm"], ["model:x/hf", "model:y/hf", "model:rm"]),
            (["model:a/b/hf", "model:c/b/hf", "x.py:f"], ["model:a/b/hf", "model:c/b/hf", "function:x.py:f"]),
            (["x.py:f", "x.py:f", "x.py:f"], ["function:x.py:f", "function:x.py:f#2", "function:x.py:f#3"]),
            (["model:rm"], ["model:rm"]),
        ],
    )
    def test_every_source_has_a_name_of_its_own(self, texts, names):
        assert [source.name for source in name_sources([parse_source(text) for text in texts])] == names


def make_rewards(scores: dict[str, list[float]], weights: list[float], environment: bool = False) -> Rewards:
    """Rewards whose sources gave these scores."""
    rewards = object.__new__(Rewards)
    rewards.environment = environment
    rewards.sources = [
        RewardSource("function", name, weight, name) for name, weight in zip(scores, weights, strict=True)
    ]
    rewards._external_scores = lambda source, _: torch.tensor(scores[source.name], dtype=torch.float64)
    return rewards


def rollout_of(*rewards: float) -> Rollout:
    return Rollout([[1]] * len(rewards), [Answer([2], [0.0], True, (), r) for r in rewards], [None] * len(rewards))


class TestSum:
    def test_sums_that_are_equal_on_paper_are_equal(self):
        given = {"a": [0.0, 0.0, 0.7], "b": [0.0, 0.2, 0.1], "c": [0.8, 0.3, -2.95]}
        total, _ = make_rewards(given, [1.0, 0.5, 0.2]).score(rollout_of(0, 0, 0), [])
        assert total.dtype == torch.float32 and total.tolist() == [total[0]] * 3
        given = {"a": [0.1, 0.0], "b": [0.2, 0.0], "c": [0.3, 0.0]}
        total, _ = make_rewards(given, [1.0, 1.0, -1.0], environment=True).score(rollout_of(1e4, 1e4), [])
        assert total.tolist() == [1e4, 1e4]

    def test_means_and_deviations_of_every_source(self):
        _, parts = make_rewards({"a": [1.0, 3.0], "b": [2.0, 2.0]}, [1.0, 1.0]).score(rollout_of(0, 0), [])
        assert parts == {"reward/a": 2, "reward/b": 2, "reward_std/a": 1, "reward_std/b": 0}

    def test_a_score_beyond_fp32_stays_finite(self):
        total, _ = make_rewards({"a": [1e300, -1e300]}, [1e10]).score(rollout_of(0, 0), [])
        assert total.isfinite().all() and total[0] > 3e38


class TestLoadFunction:
    def load(self, tmp_path, code: str, name: str = "score"):
        (tmp_path / "mine.py").write_text(textwrap.dedent(code))
        return load_function(parse_source(f"{tmp_path}/mine.py:{name}"))

    def test_loads(self, tmp_path):
        function = self.load(
            tmp_path, "def score(prompts, completions, **columns): return [len(c) for c in completions]"
        )
        assert function([], ["ab"]) == [2]

    def test_two_files_of_one_name_do_not_collide(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine.py").write_text(f"def score(prompts, completions, **columns): return '{name}'")
        loaded = [load_function(parse_source(f"{tmp_path}/{name}/mine.py:score")) for name in ("a", "b")]
        assert [f([], []) for f in loaded] == ["a", "b"]

    def test_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match="does not exist"):
            load_function(parse_source(f"{tmp_path}/none.py:score"))

    def test_missing_function_names_those_found(self, tmp_path):
        code = (
            "from math import sqrt\ndef scores(prompts, completions, **columns): ...\ndef other(): ...\ndef _own(): ..."
        )
        with pytest.raises(ConfigError) as caught:
            self.load(tmp_path, code)
        assert "expected: one of other, scores\n" in str(caught.value)
        assert "--reward.sources " in str(caught.value) and "mine.py:scores" in str(caught.value)

    def test_file_that_does_not_import(self, tmp_path):
        with pytest.raises(ConfigError, match="does not import: ModuleNotFoundError: No module named 'absent_module'"):
            self.load(tmp_path, "import absent_module")
        with pytest.raises(ConfigError, match=r"does not import: SystemExit: 3 \(.*mine.py:2\)$"):
            self.load(tmp_path, "\nraise SystemExit(3)")

    @pytest.mark.parametrize(
        "parameters, what, fix",
        [
            ("prompts, completions", "does not take the columns", "add **columns to its parameters"),
            ("prompts, **k", None, None),
            (
                "completions, answer, **k",
                "wants 'answer', and there is no such column",
                "put 'answer' into the label (preprocess: --label-key answer) and take the parameter `label`",
            ),
            (
                "completions, answer, *, level",
                "wants 'answer' and 'level', and there is no such column",
                "put 'answer' and 'level' into the label (preprocess: a column `label` with an object of them) and "
                "take the parameter `label`; add **columns to its parameters",
            ),
            ("prompts, completions, /, **k", "does not take the columns", None),
        ],
    )
    def test_signature_is_checked_at_the_start(self, tmp_path, parameters, what, fix):
        code = f"def score({parameters}): ..."
        if what is None:
            self.load(tmp_path, code)
            return
        with pytest.raises(ConfigError) as caught:
            self.load(tmp_path, code)
        assert what in caught.value.what and caught.value.fix == fix


def call(function, completions=("a", "b", "c")):
    n = len(completions)
    return score_with_function(
        function,
        ["p"] * n,
        list(completions),
        labels=["l"] * n,
        prompt_ids=[[1]] * n,
        completion_ids=[[2, 3]] * n,
        source="mine.py:score",
    )


class TestScoreWithFunction:
    def test_gets_texts_and_columns_by_keyword(self):
        seen = {}

        def function(**arguments):
            seen.update(arguments)
            return [1, 2.5, np.float32(0.5)]

        assert call(function) == [1.0, 2.5, 0.5]
        columns = {"label": ["l"] * 3, "prompt_ids": [[1]] * 3, "completion_ids": [[2, 3]] * 3}
        assert seen == {"prompts": ["p"] * 3, "completions": ["a", "b", "c"], **columns}

    @pytest.mark.parametrize(
        "answer,message",
        [
            ([1, None, 3], "gave no score at index 1: None"),
            ([1, 2, math.nan], "gave nan at index 2"),
            ([1, 2, -math.inf], "gave -inf at index 2"),
            ([1, 10**400, 3], "at index 1"),
            (["0.5", 1, 2], "gave str '0.5' at index 0"),
            ([True, "1", 2], "gave str '1' at index 1"),
            (np.array([1, math.nan, 2]), "gave nan at index 1"),
            (torch.ones(2), "2 scores for the 3 completions"),
            (torch.ones(3, 1), "answered with Tensor"),
            (np.array(["1", "2", "3"]), "gave str '1' at index 0"),
            ([1, torch.ones(1), 2], "gave list .* at index 1"),
            ([1, [2], 3], r"gave list \[2\] at index 1"),
            ([1, 2], "2 scores for the 3 completions"),
            ([1, 2, 3, 4], "4 scores for the 3 completions"),
            (None, "answered with NoneType None"),
            (1.0, "answered with float 1.0"),
        ],
    )
    def test_wrong_answers_name_source_index_and_value(self, answer, message):
        with pytest.raises(RewardError, match=message) as caught:
            call(lambda **_: answer)
        assert "'mine.py:score'" in str(caught.value)

    @pytest.mark.parametrize(
        "answer",
        [
            [True, False, 2],
            (np.bool_(True), np.int64(0), np.float32(2)),
            np.array([1.0, 0.0, 2.0], np.float16),
            torch.tensor([1.0, 0.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
            [torch.tensor(True), torch.tensor(0), torch.tensor(2.0)],
        ],
    )
    def test_numbers_of_numpy_and_torch_and_booleans(self, answer):
        scores = call(lambda **_: answer)
        assert scores == [1.0, 0.0, 2.0] and {type(score) for score in scores} == {float}

    def test_an_exception_is_a_reward_error_with_its_cause(self):
        with pytest.raises(RewardError, match="'mine.py:score' raised ZeroDivisionError: division by zero") as caught:
            call(lambda **_: 1 / 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_no_completions_no_call(self):
        assert call(lambda **_: 1 / 0, completions=()) == []


def test_check_scores_counts_from_first():
    with pytest.raises(RewardError, match="index 65"):
        check_scores([0.0, None], expected=2, source="s", first=64)


class TestExamples:
    def score(self, name: str, completions, labels=None, ids=None):
        n = len(completions)
        function = load_function(parse_source(f"{EXAMPLES}/{name}.py:{name}"))
        return score_with_function(
            function,
            ["p"] * n,
            completions,
            labels=labels or [None] * n,
            prompt_ids=[[]] * n,
            completion_ids=ids or [[]] * n,
            source=name,
        )

    @pytest.mark.parametrize(
        "completion,label,score",
        [
            ("6 x 7 is 42.", "42", 1),
            ("First 42, then 43", "42", 0),
            ("so #### 1,000", 1000, 1),
            (r"thus \boxed{\frac{1}{2}} done", r"\boxed{\frac{1}{2}}", 1),
            (r"\boxed{0.5}", "1/2", 1),
            (r"\boxed{Paris }", "paris", 1),
            ("it is -7", "-7", 1),
            ("no number", "3", 0),
            ("####", "3", 0),
            (r"\boxed{1e999999999}", "3", 0),
            ("1/0", "3", 0),
            ("", "3", 0),
        ],
    )
    def test_exact_match(self, completion, label, score):
        assert self.score("exact_match", [completion], [label]) == [score]

    def test_exact_match_needs_labels(self):
        with pytest.raises(RewardError, match="label for every prompt"):
            self.score("exact_match", ["42"])

    def test_length_penalty(self):
        assert self.score("length_penalty", [""] * 4, ids=[[0] * n for n in (10, 768, 896, 3000)]) == [0, 0, -0.5, -1]
