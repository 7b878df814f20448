"""What `mrlhf serve-reward` lets in and what it answers, over real connections;
the model is a function here (test_reward_runs.py has a real one).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest

from mrlhf.config.options import ServeRewardStage
from mrlhf.rl.rewards import server as reward_server
from mrlhf.rl.rewards.http import HttpReward
from mrlhf.rl.rewards.server import RewardServer, is_loopback

TOKEN = "a-token-of-32-characters-or-so"


class Tokenizer:
    eos_token = "$"

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [list(text.encode()) for text in texts]}


def sums(sequences: list[list[int]]) -> Future[list[float]]:
    future: Future[list[float]] = Future()
    future.set_result([float(sum(s)) for s in sequences])
    return future


@contextmanager
def serving(submit=sums, timeout_s: float = 20.0, **options) -> Iterator[RewardServer]:
    limits = {"vocab_size": 200, "max_length": 20, "max_request_bytes": 100_000, "max_batch_size": 8, **options}
    made = RewardServer(
        ("127.0.0.1", 0),
        submit=submit,
        timeout_s=timeout_s,
        tokenizer=Tokenizer(),
        fingerprint="print",
        token=TOKEN,
        **limits,
    )
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(reward_server, "HEAD_S", 0.5)
    monkeypatch.setattr(reward_server, "BODY_S", 0.5)
    with serving() as made:
        yield made


def post(server: RewardServer, content: object, **headers: bytes) -> httpx.Response:
    body = content if isinstance(content, (bytes, str)) else json.dumps(content)
    return httpx.post(
        server.url, content=body, headers={"Authorization": f"Bearer {TOKEN}".encode(), **headers}, trust_env=False
    )


GOOD = {
    "prompts": ["a"],
    "completions": ["b"],
    "labels": [{"x": [1]}],
    "prompt_ids": [[1, 2]],
    "completion_ids": [[3]],
    "tokenizer": "print",
}


def test_ids_are_scored_as_they_are_and_texts_are_tokenised(server: RewardServer) -> None:
    assert post(server, GOOD).json() == {"scores": [6.0]}
    for completion in ("b", "b$"):
        assert post(server, {"prompts": ["a"], "completions": [completion]}).json() == {
            "scores": [float(ord("a") + ord("b") + ord("$"))]
        }
    assert post(server, {"prompts": [], "completions": []}).json() == {"scores": []}
    health = httpx.get(server.url.replace("/score", "/health"), trust_env=False)
    assert health.json() == {"status": "ok", "tokenizer": "print", "max_batch_size": 8}


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", f"bearer {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer ü"]
)
def test_without_the_token_nothing_is_read(server: RewardServer, given: str) -> None:
    answer = post(server, GOOD, Authorization=given.encode())
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ("{", 400, "not a request"),
        ("[" * 40_000, 400, "not a request"),
        ('{"prompts": ["a"], "completions": ["b"], "labels": ' + "[" * 40_000, 400, "not a request"),
        ({"prompts": "a", "completions": ["b"]}, 400, "not a request"),
        ({"prompts": ["a"]}, 400, "completions"),
        ({"prompts": ["a"], "completions": [1]}, 400, "not a request"),
        ({"prompts": ["a", "b"], "completions": ["b"]}, 400, "different lengths"),
        ({**GOOD, "completion_ids": []}, 400, "different lengths"),
        ({**GOOD, "completion_ids": [[200]]}, 400, "ids outside of 0 to 199"),
        ({**GOOD, "completion_ids": [[-1]]}, 400, "ids outside"),
        ({**GOOD, "prompt_ids": [[]], "completion_ids": [[]]}, 400, "0 tokens"),
        ({**GOOD, "completion_ids": [[1] * 19]}, 400, "21 tokens; 1 to 20"),
        ({**GOOD, "tokenizer": "another"}, 409, "tokenizer 'another'"),
        ({"prompts": ["a"] * 9, "completions": ["b"] * 9}, 413, "at most 8"),
        ({"prompts": ["a" * 100_000], "completions": ["b"]}, 413, "at most 100000"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason(
    server: RewardServer, change: object, status: int, message: str
) -> None:
    answer = post(server, change)
    assert answer.status_code == status and message in answer.json()["error"]
    assert post(server, GOOD).status_code == 200


def connect(server: RewardServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port))


def raw(server: RewardServer, data: bytes, *, wait_s: float = 20.0) -> bytes:
    with connect(server) as connection:
        connection.settimeout(wait_s)
        connection.sendall(data)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def test_a_client_cannot_hold_or_fool_the_server(server: RewardServer) -> None:
    start = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    assert b" 413 " in raw(server, start + b"Content-Length: 99999999999\r\n\r\n"), "before a byte of the body has come"
    assert b" 400 " in raw(server, start + b"Content-Length: -1\r\n\r\n")
    assert b" 411 " in raw(server, start + b"\r\n")
    assert b" 411 " in raw(server, start + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n")
    assert b" 404 " in raw(server, start.replace(b"/score", b"/../x") + b"Content-Length: 0\r\n\r\n")
    assert b" 405 " in raw(server, b"DELETE /score HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 408 " in raw(server, start + b"Content-Length: 50\r\n\r\n{"), "a body that does not come"
    assert raw(server, b"") == raw(server, start) == b"", "nor does a head"
    smuggled = start + b"Content-Length: 99999999\r\n\r\n" + start + b"Content-Length: 0\r\n\r\n"
    assert raw(server, smuggled).count(b"HTTP/1.1") == 1, "what follows a refused request is not read as another"


def test_a_head_that_comes_byte_by_byte_is_cut_off(server: RewardServer) -> None:
    with connect(server) as connection, pytest.raises(ConnectionError):
        for _ in range(200):
            connection.sendall(b"x")
            time.sleep(0.05)


def test_a_second_head_that_never_ends_is_cut_off(server: RewardServer) -> None:
    body = b'{"prompts": [], "completions": []}'
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode()
    with connect(server) as connection:
        connection.settimeout(10)
        connection.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while not answer.endswith(b'{"scores":[]}'):
            answer += connection.recv(1 << 16)
        connection.sendall(b"P")  # ends uvicorn's own limit for idle connections
        assert connection.recv(1 << 16) == b""


def test_a_path_with_a_slash_is_refused_and_closed(server: RewardServer) -> None:
    for line in (b"GET /health/", b"POST /score/"):
        answer = raw(server, line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert b" 404 " in answer and b"connection: close" in answer.lower()


def test_a_slow_model_is_busy_and_its_work_is_cancelled() -> None:
    future: Future[list[float]] = Future()
    with serving(lambda sequences: future, timeout_s=0.1) as server:
        answer = post(server, GOOD)
    assert answer.status_code == 503 and answer.json() == {"error": "the model is busy"}
    assert answer.headers["Retry-After"] == "1" and future.cancelled()


def test_scores_that_are_not_finite_are_an_error() -> None:
    future: Future[list[float]] = Future()
    future.set_result([float("nan")])
    with serving(lambda sequences: future) as server:
        assert post(server, GOOD).status_code == 500


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def test_connections_beyond_the_limit_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "CONNECTIONS", 1)
    body = b'{"prompts": [], "completions": []}'
    with serving() as server, connect(server) as holding:
        holding.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b" 200 " in holding.recv(1 << 16)
        assert b" 503 " in raw(server, HEALTH), "one with the token keeps its place"
        holding.close()
        deadline = time.monotonic() + 10
        while b" 200 " not in raw(server, HEALTH):
            assert time.monotonic() < deadline, "a closed connection makes room"
            time.sleep(0.01)


@pytest.mark.parametrize("sent", [b"", HEAD[:20], HEAD.replace(TOKEN.encode(), b"wrong")])
def test_connections_without_the_token_leave_a_place_for_it(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(reward_server, "CONNECTIONS", 8)
    with serving() as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(20)]
        for connection in held:
            connection.sendall(sent)
        for _ in range(3):
            assert post(server, GOOD).json() == {"scores": [6.0]}
            held.append(stack.enter_context(connect(server)))
        held[0].settimeout(10)
        with suppress(ConnectionError):
            assert held[0].recv(1) == b"", "the oldest is dropped"


def test_with_all_of_the_real_places_taken_byte_by_byte() -> None:
    with serving() as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(reward_server.CONNECTIONS)]
        for _ in range(3):
            for connection in held:
                with suppress(ConnectionError):  # dropped for the one with the token
                    connection.sendall(b"X")
            assert post(server, GOOD).status_code == 200


def test_requests_that_come_faster_than_their_answers_are_not_kept(server: RewardServer) -> None:
    """Before, a client with the token filled the memory, a quarter of a MiB for each request that was answered."""
    body = json.dumps(GOOD).encode()
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connect(server) as connection:
        connection.settimeout(20)
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 100 << 20:
                sent += connection.send(one * 1000)
    assert post(server, GOOD).status_code == 200


def test_a_client_that_reads_no_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "WRITE_S", 0.3)
    many = 5000
    body = json.dumps({"prompts": [""] * many, "completions": [""] * many}).encode()
    scores: Future[list[float]] = Future()
    scores.set_result([1 / 3] * many)
    with serving(lambda sequences: scores, max_batch_size=many) as server, connect(server) as connection:
        connection.settimeout(20)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert post(server, GOOD).status_code == 200


def test_a_closed_connection_is_not_kept_for_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "HEAD_S", 0.3)
    many = 2_000_000
    body = b'{"prompts": ["x"], "completions": ["y"]}'
    scores: Future[list[float]] = Future()
    scores.set_result([1 / 3] * many)  # 40 MB
    with serving(lambda sequences: scores) as server, connect(server) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 20
        while not server._server.server_state.total_requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while server._server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_text_that_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def tokenise(self: Tokenizer, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        seen.extend(len(text) for text in texts)
        return {"input_ids": [[1]] * len(texts)}

    monkeypatch.setattr(Tokenizer, "__call__", tokenise)
    with serving(max_request_bytes=16 << 20) as server:
        for prompt, completion in (("a" * 15_000_000, "b"), ("a", "b" * 15_000_000), ("ab " * 5_000_000, "")):
            answer = post(server, {"prompts": ["a", prompt], "completions": ["b", completion]})
            assert answer.status_code == 400 and "sequence 1 has 150000" in answer.json()["error"]
        assert post(server, {"prompts": [" " * 2000], "completions": ["b"]}).json() == {"scores": [1.0]}
    assert seen == [3, 3, 3, 2002]


def test_the_client_gets_through_it(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "*")
    ids = [[i, i] for i in range(1, 31)]
    with HttpReward([server.url], batch_size=4, token_env="MY_TOKEN") as reward, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> list[float]:
            return reward.score(
                ["p"] * 30, ["c"] * 30, labels=[None] * 30, prompt_ids=ids, completion_ids=[[1]] * 30, tokenizer="print"
            )

        for scores in pool.map(ask, range(4)):
            assert scores == [2.0 * i + 1 for i in range(1, 31)]


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("a.b", False)],
)
def test_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_requests_that_wait_go_through_the_model_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrlhf.commands import serve_reward

    monkeypatch.setattr(serve_reward, "Model", lambda *args, **options: None)
    config, one_rank = (
        ServeRewardStage("rm", max_batch_size=4, normalize=False, dtype="float32"),
        SimpleNamespace(world=1),
    )
    scorer = serve_reward.Scorer(config, source=None, layout=one_rank)
    batches: list[int] = []

    def score(sequences: list[list[int]]) -> list[float]:
        batches.append(len(sequences))
        return [float(sum(s)) for s in sequences]

    monkeypatch.setattr(scorer, "score_sequences", score)
    futures = [scorer.submit([[i]] * size) for i, size in enumerate((1, 2, 1, 3, 4, 1))]
    assert futures[2].cancel(), "its client waits no longer"
    scorer.stop()
    late = scorer.submit([[9]])
    scorer.serve_requests()
    assert batches == [3, 3, 4, 1], "4 at most; the cancelled request is not scored"
    assert [f.result() for f in futures if not f.cancelled()] == [[0.0], [1.0] * 2, [3.0] * 3, [4.0] * 4, [5.0]]
    with pytest.raises(TimeoutError):
        late.result(timeout=0)
