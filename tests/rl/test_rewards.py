from __future__ import annotations

import json
import math
import socket
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mrlhf.errors import ConfigError, RewardError
from mrlhf.rl.rewards import HttpReward, RewardSource, check_scores, combine, load_function, parse_source, score_with_function

EXAMPLES = Path(__file__).parents[2] / "examples" / "rewards"


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


class TestLoadFunction:
    def load(self, tmp_path, code: str, name: str = "score"):
        (tmp_path / "mine.py").write_text(textwrap.dedent(code))
        return load_function(parse_source(f"{tmp_path}/mine.py:{name}"))

    def test_loads(self, tmp_path):
        function = self.load(tmp_path, "def score(prompts, completions, **columns): return [len(c) for c in completions]")
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
        code = "from math import sqrt\ndef scores(prompts, completions, **columns): ...\ndef other(): ...\ndef _own(): ..."
        with pytest.raises(ConfigError) as caught:
            self.load(tmp_path, code)
        assert "expected: one of other, scores\n" in str(caught.value)
        assert "did you mean" in str(caught.value) and "mine.py:scores ?" in str(caught.value)

    def test_file_that_does_not_import(self, tmp_path):
        with pytest.raises(ConfigError, match="does not import: ModuleNotFoundError: No module named 'absent_module'"):
            self.load(tmp_path, "import absent_module")

    def test_signature_is_checked_at_the_start(self, tmp_path):
        with pytest.raises(ConfigError, match=r"add \*\*columns"):
            self.load(tmp_path, "def score(prompts, completions): ...")


def call(function, completions=("a", "b", "c")):
    n = len(completions)
    return score_with_function(
        function, ["p"] * n, list(completions), labels=["l"] * n, prompt_ids=[[1]] * n, completion_ids=[[2, 3]] * n, source="mine.py:score"
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
            ([1, True, 2], "gave bool True at index 1"),
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

    def test_an_exception_is_a_reward_error_with_its_cause(self):
        with pytest.raises(RewardError, match="'mine.py:score' raised ZeroDivisionError: division by zero") as caught:
            call(lambda **_: 1 / 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_no_completions_no_call(self):
        assert call(lambda **_: 1 / 0, completions=()) == []


class Server:
    """A reward server on 127.0.0.1: answers with `respond(payload, number of the request)` -> (status, body text)."""

    def __init__(self, respond):
        self.requests: list[tuple[dict, dict]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):  # noqa: N802
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((payload, dict(self.headers)))
                    number = len(outer.requests)
                status, text = respond(payload, number)
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    servers = []

    def start(respond) -> Server:
        servers.append(Server(respond))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def lengths(payload, number=0):
    return 200, json.dumps({"scores": [len(text) for text in payload["completions"]]})


def ask(urls, completions=("a", "bb", "ccc"), **options):
    with HttpReward(urls, **{"backoff_s": 0.01, "timeout_s": 5.0, **options}) as reward:
        return reward.score(["p"] * len(completions), list(completions), labels=[None] * len(completions))


class TestHttpReward:
    def test_payload_and_scores(self, serve):
        server = serve(lengths)
        with HttpReward([server.url]) as reward:
            assert reward.score(["p", "q"], ["a", "bb"], labels=["x", {"y": 1}]) == [1.0, 2.0]
        assert server.requests[0][0] == {"prompts": ["p", "q"], "completions": ["a", "bb"], "labels": ["x", {"y": 1}]}
        assert "Authorization" not in server.requests[0][1]

    def test_batches_go_round_the_endpoints_and_keep_their_order(self, serve):
        def slow_for_short(payload, number):
            time.sleep(0.05 / len(payload["completions"][0]))
            return lengths(payload)

        servers = [serve(slow_for_short), serve(slow_for_short)]
        texts = ["x" * (i + 1) for i in range(10)]
        assert ask([s.url for s in servers], texts, batch_size=2) == [float(i + 1) for i in range(10)]
        assert sorted(len(s.requests) for s in servers) == [2, 3]
        assert all(len(payload["completions"]) == 2 for s in servers for payload, _ in s.requests)

    def test_single_batches_go_round_too(self, serve):
        servers = [serve(lengths), serve(lengths)]
        with HttpReward([s.url for s in servers], first_endpoint=1) as reward:
            reward.score(["p"], ["a"], labels=[None])
            assert [len(s.requests) for s in servers] == [0, 1]
            reward.score(["p"], ["a"], labels=[None])
            assert [len(s.requests) for s in servers] == [1, 1]

    def test_bearer_token(self, serve, monkeypatch):
        server = serve(lengths)
        monkeypatch.setenv("MY_TOKEN", "abc")
        ask([server.url], token_env="MY_TOKEN")
        assert server.requests[0][1]["Authorization"] == "Bearer abc"
        monkeypatch.delenv("MY_TOKEN")
        with pytest.raises(ConfigError, match="MY_TOKEN"):
            HttpReward([server.url], token_env="MY_TOKEN")

    def test_passing_failures_are_retried(self, serve):
        server = serve(lambda payload, number: (503, "busy") if number <= 2 else lengths(payload))
        assert ask([server.url], retries=2) == [1.0, 2.0, 3.0]
        assert len(server.requests) == 3

    def test_backoff_doubles(self, serve):
        server = serve(lambda payload, number: (500, "") if number <= 3 else lengths(payload))
        start = time.monotonic()
        ask([server.url], retries=3, backoff_s=0.05)
        assert time.monotonic() - start >= 0.05 + 0.1 + 0.2

    def test_a_dead_endpoint_is_covered_by_the_other(self, serve):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{unused.getsockname()[1]}/score"
        server = serve(lengths)
        assert ask([dead, server.url], retries=1) == [1.0, 2.0, 3.0]

    def test_lasting_failure_is_an_error_never_a_zero(self, serve):
        server = serve(lambda payload, number: (500, "out of memory"))
        with pytest.raises(RewardError, match="try 3: status 500: 'out of memory'") as caught:
            ask([server.url], retries=2)
        assert server.url in str(caught.value)
        assert len(server.requests) == 3

    def test_client_errors_are_not_retried(self, serve):
        server = serve(lambda payload, number: (401, "who are you"))
        with pytest.raises(RewardError, match="try 1: status 401: 'who are you'"):
            ask([server.url])
        assert len(server.requests) == 1

    def test_slow_answers_time_out(self, serve):
        done = threading.Event()

        def wait(payload, number):
            done.wait(5)
            return lengths(payload)

        server = serve(wait)
        with pytest.raises(RewardError, match="try 2: ReadTimeout"):
            ask([server.url], timeout_s=0.1, retries=1)
        done.set()

    @pytest.mark.parametrize(
        "text,message",
        [
            ("<html>", "answered with no JSON: '<html>'"),
            ("[1, 2, 3]", r"answered without 'scores': \[1, 2, 3\]"),
            ('{"score": [1, 2, 3]}', "answered without 'scores'"),
            ('{"scores": [1, 2]}', "2 scores for the 3 completions"),
            ('{"scores": [1, NaN, 3]}', "gave nan at index 1"),
            ('{"scores": [1, 1e999, 3]}', "gave inf at index 1"),
            ('{"scores": [1, 2, null]}', "gave no score at index 2"),
            ('{"scores": [1, "2", 3]}', "gave str '2' at index 1"),
            ('{"scores": [1, true, 3]}', "gave bool True at index 1"),
        ],
    )
    def test_wrong_answers_are_errors_at_once(self, serve, text, message):
        server = serve(lambda payload, number: (200, text))
        with pytest.raises(RewardError, match=message) as caught:
            ask([server.url])
        assert server.url in str(caught.value)
        assert len(server.requests) == 1

    def test_index_is_that_of_the_whole_list_and_the_rest_is_given_up(self, serve):
        def respond(payload, number):
            return (200, '{"scores": [null]}') if payload["completions"] == ["ccc"] else (503, "")

        server = serve(respond)
        start = time.monotonic()
        with pytest.raises(RewardError, match="no score at index 2"):
            ask([server.url], batch_size=1, backoff_s=20.0, concurrency=3)
        assert time.monotonic() - start < 10

    def test_no_completions_no_request(self, serve):
        server = serve(lengths)
        assert ask([server.url], completions=()) == []
        assert not server.requests

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"concurrency": 0}, {"retries": -1}, {"timeout_s": 0}, {"backoff_s": -1}])
    def test_wrong_settings_are_refused(self, options):
        with pytest.raises(ConfigError):
            HttpReward(["http://a/s"], **options)
        with pytest.raises(ConfigError):
            HttpReward([])


class TestCombine:
    def test_weighted_sum(self):
        assert combine([(1.0, [1.0, 2.0]), (-0.5, [4.0, 0.0])]) == [-1.0, 2.0]

    def test_wrong_parts_are_refused(self):
        with pytest.raises(RewardError, match=r"\[2, 1\]"):
            combine([(1.0, [1.0, 2.0]), (1.0, [1.0])])
        with pytest.raises(RewardError, match="no reward source"):
            combine([])


def test_check_scores_counts_from_first():
    with pytest.raises(RewardError, match="index 65"):
        check_scores([0.0, None], expected=2, source="s", first=64)


class TestExamples:
    def score(self, name: str, completions, labels=None, ids=None):
        n = len(completions)
        function = load_function(parse_source(f"{EXAMPLES}/{name}.py:{name}"))
        return score_with_function(
            function, ["p"] * n, completions, labels=labels or [None] * n, prompt_ids=[[]] * n, completion_ids=ids or [[]] * n, source=name
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
