"""What `mrlhf serve-reward` lets in and what it answers, over real connections; the model is a function here (test_reward_runs.py has a real one)."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from mrlhf.rl.rewards import server as reward_server
from mrlhf.rl.rewards.http import HttpReward
from mrlhf.rl.rewards.server import RewardServer, is_loopback

TOKEN = "a-token-of-32-characters-or-so"


class Tokenizer:
    eos_token = "$"

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [list(text.encode()) for text in texts]}


@contextmanager
def serving() -> Iterator[RewardServer]:
    made = RewardServer(
        ("127.0.0.1", 0), score=lambda sequences: [float(sum(s)) for s in sequences], tokenizer=Tokenizer(), fingerprint="print", vocab_size=200,
        max_length=20, max_request_bytes=100_000, max_batch_size=8, token=TOKEN,
    )  # fmt: skip
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(reward_server._Handler, "timeout", 0.5)
    with serving() as made:
        yield made


def post(server: RewardServer, content: object, **headers: bytes) -> httpx.Response:
    body = content if isinstance(content, (bytes, str)) else json.dumps(content)
    return httpx.post(server.url, content=body, headers={"Authorization": f"Bearer {TOKEN}".encode(), **headers}, trust_env=False)


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
        assert post(server, {"prompts": ["a"], "completions": [completion]}).json() == {"scores": [float(ord("a") + ord("b") + ord("$"))]}
    assert post(server, {"prompts": [], "completions": []}).json() == {"scores": []}
    health = httpx.get(server.url.replace("/score", "/health"), trust_env=False)
    assert health.json() == {"status": "ok", "tokenizer": "print", "max_batch_size": 8}


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"bearer {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer ü"])
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
def test_wrong_requests_are_refused_with_the_reason(server: RewardServer, change: object, status: int, message: str) -> None:
    answer = post(server, change)
    assert answer.status_code == status and message in answer.json()["error"]
    assert post(server, GOOD).status_code == 200


def raw(server: RewardServer, data: bytes, *, wait_s: float = 20.0) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.settimeout(wait_s)
        connection.sendall(data)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def test_a_client_cannot_hold_or_fool_the_server(server: RewardServer) -> None:
    start = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    assert b" 413 " in raw(server, start + b"Content-Length: 99999999999\r\n\r\n"), "before a byte of the body has come"
    assert b" 411 " in raw(server, start + b"Content-Length: -1\r\n\r\n")
    assert b" 411 " in raw(server, start + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n")
    assert b" 404 " in raw(server, start.replace(b"/score", b"/../x") + b"Content-Length: 0\r\n\r\n")
    assert b" 501 " in raw(server, b"DELETE /score HTTP/1.1\r\nHost: x\r\n\r\n")
    assert raw(server, start + b"Content-Length: 50\r\n\r\n{") == b"", "silence ends the connection"
    smuggled = start + b"Content-Length: 99999999\r\n\r\n" + start + b"Content-Length: 0\r\n\r\n"
    assert raw(server, smuggled).count(b"HTTP/1.1") == 1, "what follows a refused request is not read as another"


def test_connections_beyond_the_limit_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "CONNECTIONS", 1)
    with serving() as server, socket.create_connection(("127.0.0.1", server.server_port)) as holding:
        assert b" 503 " in raw(server, b"GET /health HTTP/1.1\r\n\r\n"), "connections are taken in the order in which they were made"
        holding.close()
        deadline = time.monotonic() + 10
        while b" 200 " not in raw(server, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"):
            assert time.monotonic() < deadline, "a closed connection makes room"
            time.sleep(0.01)


def test_the_client_gets_through_it(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "*")
    ids = [[i, i] for i in range(1, 31)]
    with HttpReward([server.url], batch_size=4, token_env="MY_TOKEN") as reward, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> list[float]:
            return reward.score(["p"] * 30, ["c"] * 30, labels=[None] * 30, prompt_ids=ids, completion_ids=[[1]] * 30, tokenizer="print")

        for scores in pool.map(ask, range(4)):
            assert scores == [2.0 * i + 1 for i in range(1, 31)]


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("a.b", False)]
)
def test_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local
