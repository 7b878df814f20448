"""The HTTP client against real servers on this machine: slow, broken, lying and dead ones."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mrlhf.errors import ConfigError, RewardError
from mrlhf.rl.rewards.http import FAILURES_TO_OPEN, Endpoints, HttpReward


class Server:
    """A reward server on 127.0.0.1: answers with `respond(payload, number of the request)` -> (status, body text,
    headers or a fault).
    """

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
                status, text, *more = respond(payload, number)
                fault = more[0] if more and isinstance(more[0], str) else ""
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    return
                try:
                    self.send_response(status)
                    for name, value in (more[0] if more and not fault else {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode()) + (fault == "cut")))
                    self.end_headers()
                    for piece in text if fault == "dribble" else [text]:
                        self.wfile.write(piece.encode())
                        time.sleep(0.05 if fault == "dribble" else 0)
                    self.close_connection = bool(fault)
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

    def test_what_comes_after_an_answer_is_not_the_next_answer(self):
        listener = socket.create_server(("127.0.0.1", 0))

        def serve_two(connection):
            data = b""
            while part := connection.recv(65536):
                data += part
                if b"\r\n\r\n" in data and data.endswith(b"}"):
                    answers = [f'{{"scores": [{score}]}}' for score in (1, 99)]
                    texts = [f"HTTP/1.1 200 OK\r\nContent-Length: {len(a)}\r\n\r\n{a}" for a in answers]
                    connection.sendall("".join(texts).encode())
                    data = b""

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve_two, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        with HttpReward([f"http://127.0.0.1:{listener.getsockname()[1]}/"], timeout_s=5.0) as reward:
            assert [reward.score(["p"], ["a"], labels=[None]) for _ in range(3)] == [[1.0]] * 3
        listener.close()

    @pytest.mark.parametrize(
        ("variable", "value"), [("ALL_PROXY", "socks5://127.0.0.1:9"), ("SSL_CERT_FILE", "/nothing/here.pem")]
    )
    def test_an_environment_that_cannot_be_used_is_a_config_error(self, monkeypatch, variable, value):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError, match=r"(?s)no HTTP client.*ALL_PROXY.*SSL_CERT_FILE"):
            HttpReward(["http://127.0.0.1/"])

    @pytest.mark.parametrize("url", ["http://xn--/", "http://a\0/", "http://a/?x=\ud800"])
    def test_a_url_that_cannot_be_sent_is_a_config_error(self, url):
        with pytest.raises(ConfigError, match="is not valid"):
            HttpReward([url])

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

    def test_backoff_doubles_with_jitter(self, serve):
        server = serve(lambda payload, number: (500, "") if number <= 3 else lengths(payload))
        start = time.monotonic()
        ask([server.url], retries=3, backoff_s=0.05)
        assert time.monotonic() - start >= (0.05 + 0.1 + 0.2) / 2

    def test_retry_after_is_kept_to(self, serve):
        server = serve(lambda payload, number: (429, "", {"Retry-After": "1"}) if number == 1 else lengths(payload))
        start = time.monotonic()
        assert ask([server.url], retries=1, backoff_s=0) == [1.0, 2.0, 3.0]
        assert time.monotonic() - start >= 1
        never = serve(lambda payload, number: (503, "", {"Retry-After": "3600"}))
        with pytest.raises(RewardError, match="the next try would end after 5 s"):
            ask([never.url], total_s=5.0)
        assert len(never.requests) == 1

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

    @pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422])
    def test_client_errors_are_not_retried(self, serve, status):
        server = serve(lambda payload, number: (status, "who are you"))
        with pytest.raises(RewardError, match=f"try 1: status {status}: 'who are you'"):
            ask([server.url])
        assert len(server.requests) == 1

    def test_redirects_are_not_followed(self, serve):
        other = serve(lengths)
        for target in (other.url, "http://169.254.169.254/latest", "file:///etc/passwd"):
            server = serve(lambda payload, number, target=target: (307, "", {"Location": target}))
            with pytest.raises(RewardError, match="try 1: status 307.*not followed"):
                ask([server.url])
        assert not other.requests

    def test_the_token_is_in_no_message(self, serve, monkeypatch):
        monkeypatch.setenv("MY_TOKEN", "abc-123-very-secret")
        for status in (403, 200):
            server = serve(lambda payload, number, status=status: (status, "you sent abc-123-very-secret"))
            with pytest.raises(RewardError, match="you sent <redacted>") as caught:
                ask([server.url], token_env="MY_TOKEN", retries=0)
            assert "very-secret" not in str(caught.value)

    def test_a_huge_answer_is_cut_off(self, serve):
        server = serve(lambda payload, number: (200, "[" * 5_000_000))
        with pytest.raises(RewardError, match="an answer of more than"):
            ask([server.url], retries=0)

    def test_ids_travel_with_the_fingerprint_of_their_tokenizer(self, serve):
        server = serve(lengths)
        with HttpReward([server.url], batch_size=1) as reward:
            reward.score(
                ["p", "q"], ["a", "b"], labels=[1, 2], prompt_ids=[[1], [2]], completion_ids=[[3], [4]], tokenizer="f"
            )
        sent = sorted((payload for payload, _ in server.requests), key=lambda p: p["labels"])
        assert sent[1] == {
            "prompts": ["q"],
            "completions": ["b"],
            "labels": [2],
            "prompt_ids": [[2]],
            "completion_ids": [[4]],
            "tokenizer": "f",
        }

    def test_a_retry_has_the_key_of_the_first_try(self, serve):
        server = serve(lambda payload, number: (500, "") if number == 1 else lengths(payload))
        ask([server.url], batch_size=3)
        first, second = (headers["Idempotency-Key"] for _, headers in server.requests)
        assert first == second

    def test_200_mixed_faults_lose_no_sample(self, serve):
        """Each of 100 answers meets two faults, of ten kinds, before it is scored."""
        faults = [
            (500, "out of memory"),
            (503, "busy", {"Retry-After": "0"}),
            (429, "later"),
            (200, "", "reset"),
            (200, '{"scores": [1', "cut"),
            (200, "<html>"),
            (200, '{"scores": [1.0, 2.0]}'),
            (200, '{"scores": [NaN]}'),
            (200, '{"scores": [0.0]}' + " " * 40, "dribble"),
            (200, "[" * 50_000),
        ]
        seen: dict[str, int] = {}
        lock, met = threading.Lock(), []

        def respond(payload, number):
            text = payload["completions"][0]
            with lock:
                seen[text] = seen.get(text, 0) + 1
                if seen[text] > 2:
                    return lengths(payload)
                met.append(faults[len(met) % len(faults)])
                return met[-1]

        servers = [serve(respond), serve(respond)]
        texts = ["x" * (i + 1) for i in range(100)]
        scores = ask(
            [s.url for s in servers], texts, batch_size=1, retries=6, backoff_s=0.002, timeout_s=0.5, concurrency=16
        )
        assert scores == [float(len(t)) for t in texts]
        assert len(met) == 200

    def test_slow_answers_time_out(self, serve):
        done = threading.Event()

        def wait(payload, number):
            done.wait(5)
            return lengths(payload)

        server = serve(wait)
        with pytest.raises(RewardError, match="try 2: its answer was not whole after 0.1 s"):
            ask([server.url], timeout_s=0.1, retries=1)
        done.set()
        dribbling = serve(lambda payload, number: (200, "[" * 1000, "dribble"))
        start = time.monotonic()
        with pytest.raises(RewardError, match="not whole after 0.2 s"):
            ask([dribbling.url], timeout_s=0.2, retries=0)
        assert time.monotonic() - start < 15

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
    def test_wrong_answers_are_errors_after_the_retries(self, serve, text, message):
        server = serve(lambda payload, number: (200, text))
        with pytest.raises(RewardError, match=message) as caught:
            ask([server.url], retries=1)
        assert server.url in str(caught.value)
        assert len(server.requests) == 2

    def test_index_is_that_of_the_whole_list_and_the_rest_is_given_up(self, serve):
        def respond(payload, number):
            return (400, '{"scores": [null]}') if payload["completions"] == ["ccc"] else (503, "")

        server = serve(respond)
        start = time.monotonic()
        with pytest.raises(RewardError, match="from index 2, try 1: status 400"):
            ask([server.url], batch_size=1, backoff_s=20.0, concurrency=3)
        assert time.monotonic() - start < 18, "20 s before the next try"

    def test_no_completions_no_request(self, serve):
        server = serve(lengths)
        assert ask([server.url], completions=()) == []
        assert not server.requests

    @pytest.mark.parametrize(
        "options",
        [{"batch_size": 0}, {"concurrency": 0}, {"retries": -1}, {"timeout_s": 0}, {"total_s": 0}, {"backoff_s": -1}],
    )
    def test_wrong_settings_are_refused(self, options):
        with pytest.raises(ConfigError):
            HttpReward(["http://a/s"], **options)
        with pytest.raises(ConfigError):
            HttpReward([])


@contextmanager
def raw_server(answer):
    """Calls answer(connection) for every connection. It ends when the client has closed it, and after 15 s."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection):
            connection.settimeout(15)
            with contextlib.suppress(OSError), connection:
                answer(connection)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/score"


def drip(start: bytes, piece: bytes, *, read: bool = True, pause_s: float = 0.02):
    def answer(connection):
        if read:
            connection.recv(1 << 16)
        connection.sendall(start)
        end = time.monotonic() + 15
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(pause_s)

    return answer


def read_slowly(connection):
    end = time.monotonic() + 15
    while time.monotonic() < end and connection.recv(1):
        time.sleep(0.02)


def silent(connection):
    while connection.recv(1 << 16):
        pass


OK = b"HTTP/1.1 200 OK\r\n"
SLOW = {
    "status line": drip(b"", b"H"),
    "head": drip(OK + b"X-A: ", b"a"),
    "heads": drip(OK, b"X-A: a\r\n"),
    "100": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "flood of 103": drip(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100, pause_s=0),
    "before the request": drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n", read=False),
    "body": drip(OK + b"Content-Length: 5000\r\n\r\n", b" "),
    "body of an error": drip(b"HTTP/1.1 500 X\r\nContent-Length: 5000\r\n\r\n", b" "),
    "chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "size of a chunk": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "trailers": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a"),
    "silent": silent,
    "reads nothing": lambda connection: time.sleep(15),
    "reads slowly": read_slowly,
}


class TestTimeLimits:
    """Each server would hold a client for 15 s or more that has no limit on the whole request."""

    def ends(self, url, *, message, completions=("a", "bb", "ccc"), **options):
        start = time.monotonic()
        with pytest.raises(RewardError, match=message):
            ask([url], completions, **options)
        assert time.monotonic() - start < 8

    @pytest.mark.parametrize("case", SLOW)
    @pytest.mark.parametrize("of", ["request", "total"])
    def test_both_hold_whatever_comes_slowly(self, case, of):
        limits = {"timeout_s": 0.2, "retries": 1} if of == "request" else {"timeout_s": 60, "total_s": 0.4}
        completions = ["x" * 10_000_000] if "reads" in case else ["a"]
        with raw_server(SLOW[case]) as url:
            message = (
                "try 2.*not whole after 0.2 s"
                if of == "request"
                else "not whole after.*the next try would end after 0.4 s"
            )
            self.ends(url, message=message, completions=completions, **limits)

    @pytest.mark.parametrize("answer", [silent, drip(b"\x16\x03\x03\x3f\xff", b"\x02", read=False)])
    def test_tls_that_does_not_begin(self, answer):
        with raw_server(answer) as url:
            self.ends(
                url.replace("http:", "https:"), message="not whole after|ConnectTimeout", timeout_s=0.2, retries=0
            )

    def test_a_server_that_accepts_no_connection(self):
        with socket.socket() as listener, contextlib.ExitStack() as waiting:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):  # the queue is full
                waiting.enter_context(socket.socket()).setblocking(False)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/score"
            self.ends(url, message="not whole after|ConnectTimeout", timeout_s=0.2, retries=1)

    def test_a_name_that_is_looked_up_for_ever(self, monkeypatch):
        done = threading.Event()
        look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: done.wait(15) and look_up(*a, **k))
        try:
            self.ends("http://nowhere.test/score", message="not whole after|ConnectTimeout", timeout_s=0.2, retries=1)
        finally:
            done.set()

    def test_the_limit_of_a_batch_begins_with_its_turn(self, serve):
        def slow(payload, number):
            time.sleep(0.1)
            return lengths(payload)

        texts = ["x" * (i + 1) for i in range(8)]
        server = serve(slow)
        scores = ask([server.url], texts, batch_size=1, concurrency=1, timeout_s=5, total_s=0.75)
        assert scores == [float(len(t)) for t in texts]


@pytest.mark.parametrize(
    "header", ["\u00b2", "nan", "9" * 5000, "-1", "Fri, 31 Dec 9999 23:59:59 -9900", "\u0663", "x"]
)
def test_odd_retry_after(serve, header):
    server = serve(lambda payload, number: (429, "", {"Retry-After": header}) if number == 1 else lengths(payload))
    if header.startswith("9"):
        with pytest.raises(RewardError, match="status 429.*the next try would end after"):
            ask([server.url], total_s=5.0)
    else:
        assert ask([server.url], retries=1) == [1.0, 2.0, 3.0]


class TestEndpoints:
    def test_the_idle_one_is_taken_and_equal_ones_in_turn(self):
        servers = Endpoints(["a", "b", "c"], first=1)
        assert [servers.take() for _ in range(3)] == ["b", "c", "a"]
        servers.give_back("c", failed=False)
        assert servers.take() == "c"
        assert servers.take(avoid="b") in ("a", "c")

    def test_a_failing_one_is_left_alone_then_tried_once(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("mrlhf.rl.rewards.http.time.monotonic", lambda: now[0])
        servers = Endpoints(["a", "b"])

        def use(n: int, bad: tuple[str, ...]) -> list[str]:
            taken = []
            for _ in range(n):
                taken.append(servers.take())
                servers.give_back(taken[-1], failed=taken[-1] in bad)
            return taken

        assert use(2 * FAILURES_TO_OPEN, ("a",)).count("a") == FAILURES_TO_OPEN
        assert use(10, ("a",)) == ["b"] * 10
        now[0] = 21.0
        assert use(10, ("a",)).count("a") == 1, "half open: one trial, and closed off again"
        now[0] = 42.0
        assert use(10, ()).count("a") == 5
        assert use(2 * FAILURES_TO_OPEN + 4, ("a", "b")), "with none left the least bad one is asked"
