"""The HTTP side of `mrlhf serve-reward`: which requests it accepts, and its answers. The model is behind `score`.

    POST /score   docs/rewards.md describes request and answer      GET /health   {"status": "ok"}, without a token
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

SILENCE_S = 30.0  # a client that sends nothing for so long is dropped
CONNECTIONS = 128  # at once; further ones get 503


def is_loopback(host: str) -> bool:
    """Whether a server that listens there can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ScoreRequest(msgspec.Struct):
    """A request; further fields are ignored. The ids are scored, with their tokenizer's fingerprint, else the texts."""

    prompts: list[str]
    completions: list[str]
    prompt_ids: list[list[int]] | None = None
    completion_ids: list[list[int]] | None = None
    tokenizer: str | None = None


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Listens at `address`. score: returns a float for each list of token ids; TimeoutError if the model is too slow.

    token: bearer token that every request but /health needs; None: no token. Requests are limited to max_request_bytes
    and max_batch_size completions of max_length tokens.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], *, score: Callable[[list[list[int]]], list[float]], tokenizer: Any,
        fingerprint: str, vocab_size: int, max_length: int, max_request_bytes: int, max_batch_size: int,
        token: str | None,
    ) -> None:
        self.score, self.tokenizer, self.fingerprint = score, tokenizer, fingerprint
        self.vocab_size, self.max_length = vocab_size, max_length
        self.max_request_bytes, self.max_batch_size, self.token = max_request_bytes, max_batch_size, token
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._tokenizer_lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}/score"

    def server_bind(self) -> None:
        """Skips HTTPServer's look-up of the host name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            head = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
            request.sendall(head + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect."""

    def answer(self, body: bytes) -> dict[str, Any]:
        """Raises _Refused."""
        try:
            request = msgspec.json.decode(body, type=ScoreRequest)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise _Refused(400, f"not a request: {error}") from error
        sequences = self._sequences(request)
        try:
            scores = self.score(sequences) if sequences else []
        except TimeoutError as error:
            raise _Refused(503, "the model is busy") from error
        if not all(map(math.isfinite, scores)):
            raise _Refused(500, "the model gave a score that is not finite")
        return {"scores": scores}

    def _sequences(self, request: ScoreRequest) -> list[list[int]]:
        columns = msgspec.structs.asdict(request)
        sizes = {name: len(values) for name, values in columns.items() if isinstance(values, list)}
        if len(set(sizes.values())) != 1:
            raise _Refused(400, f"columns of different lengths: {sizes}")
        if len(request.completions) > self.max_batch_size:
            raise _Refused(413, f"{len(request.completions)} completions; at most {self.max_batch_size} a request")
        if request.prompt_ids is not None and request.completion_ids is not None:
            if request.tokenizer is not None and request.tokenizer != self.fingerprint:
                what = f"the ids are of tokenizer {request.tokenizer[:64]!r}, the model's is {self.fingerprint!r}"
                raise _Refused(409, what)
            sequences = [p + c for p, c in zip(request.prompt_ids, request.completion_ids, strict=True)]
        else:
            end = self.tokenizer.eos_token
            texts = [p + c.removesuffix(end) + end for p, c in zip(request.prompts, request.completions, strict=True)]
            with self._tokenizer_lock:
                sequences = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for i, ids in enumerate(sequences):
            if not 0 < len(ids) <= self.max_length:
                raise _Refused(400, f"sequence {i} has {len(ids)} tokens; 1 to {self.max_length} are possible")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                raise _Refused(400, f"sequence {i} has ids outside of 0 to {self.vocab_size - 1}")
        return sequences


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mrlhf", ""
    timeout = SILENCE_S

    def do_GET(self) -> None:  # noqa: N802
        if self.path == "/health":
            server = self.server
            answer = {"status": "ok", "tokenizer": server.fingerprint, "max_batch_size": server.max_batch_size}
            self._send(200, answer)
        else:
            self._send(404, {"error": "GET /health or POST /score"})

    def do_POST(self) -> None:  # noqa: N802
        self.close_connection = True  # unless the whole body is read: the rest of it is no request
        try:
            self._send(200, self._score())
        except _Refused as refusal:
            self._send(refusal.status, {"error": str(refusal)})

    def _score(self) -> dict[str, Any]:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        wanted = f"Bearer {token}".encode()
        if token is not None and not hmac.compare_digest(given.encode("utf-8", "replace"), wanted):
            raise _Refused(401, "a bearer token is needed")
        if self.path != "/score":
            raise _Refused(404, "POST /score")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise _Refused(411, "Content-Length is needed")
        if int(length) > self.server.max_request_bytes:
            raise _Refused(413, f"{length} bytes; at most {self.server.max_request_bytes} are taken")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise _Refused(400, "the body is cut")
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        return self.server.answer(body)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Logs nothing: a trainer sends thousands of requests."""
