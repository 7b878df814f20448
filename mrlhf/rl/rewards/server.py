"""The HTTP side of `mrlhf serve-reward`: which requests it accepts, and its answers. The model is behind `submit`.

    POST /score   docs/rewards.md describes request and answer      GET /health   {"status": "ok"}, without a token

The one file that imports starlette and uvicorn.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec

from mrlhf.errors import EnvironmentProblem

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    what = f"mrlhf serve-reward needs the package {error.name}"
    raise EnvironmentProblem(what, fix="pip install starlette uvicorn") from error

HEAD_S, BODY_S = 30, 60  # a client is dropped if a request head, or a body, is not complete after this time
IDLE_S = 30  # between two requests of a connection
WRITE_S = 30  # a client is dropped if it does not read its answers for this time
CONNECTIONS = 128  # at once; a further one takes the place of the oldest without a token, or else gets 503
PIPELINED_BYTES = 1 << 20  # a client is dropped if it sends more than this beyond the request in work
CHARACTERS_PER_TOKEN = 128  # the longest tokens (runs of spaces) of common vocabularies: a longer text is not tokenised

Sequences = list[list[int]]


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


class RewardServer:
    """Listens at `address` from its creation, and answers in a thread of its own between `start` and `stop`.

    submit: returns the future scores of lists of token ids; after timeout_s without them the client gets 503.
    token: bearer token that every POST needs; None: no token. Requests are limited to max_request_bytes and
    max_batch_size completions of max_length tokens.
    """

    def __init__(self, address: tuple[str, int], *, submit: Callable[[Sequences], Future[list[float]]],
                 timeout_s: float, tokenizer: Any, fingerprint: str, vocab_size: int, max_length: int,
                 max_request_bytes: int, max_batch_size: int, token: str | None) -> None:
        self.submit, self.timeout_s = submit, timeout_s
        self.tokenizer, self.fingerprint, self.vocab_size = tokenizer, fingerprint, vocab_size
        self.max_length, self.max_request_bytes, self.max_batch_size = max_length, max_request_bytes, max_batch_size
        self.token, self._tokenizer_lock = token, threading.Lock()
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        listener = socket.create_server(address, family=family, backlog=CONNECTIONS)
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}/score" if ":" in host else f"http://{host}:{port}/score"
        routes = [Route("/health", self._health, methods=["GET"]), Route("/score", self._score, methods=["POST"])]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _refuse})
        app.router.redirect_slashes = False  # a redirect would answer without a token, and keep the connection
        protocol: Any = partial(_Protocol, trusts=self._trusts)
        config = uvicorn.Config(app, http=protocol, ws="none", loop="asyncio", lifespan="off", log_config=None,
                                log_level="error", access_log=False, server_header=False, proxy_headers=False,
                                limit_concurrency=CONNECTIONS + 1, timeout_keep_alive=IDLE_S,
                                timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Closes the port and waits for the answers in work, one second at most."""
        self._server.should_exit = True
        self._thread.join()

    async def _health(self, request: Request) -> JSONResponse:
        answer = {"status": "ok", "tokenizer": self.fingerprint, "max_batch_size": self.max_batch_size}
        return JSONResponse(answer, headers={"Connection": "close"})  # else it could be held without a token

    def _trusts(self, authorization: bytes) -> bool:
        return self.token is None or hmac.compare_digest(authorization, f"Bearer {self.token}".encode())

    async def _score(self, request: Request) -> JSONResponse:
        if not self._trusts(request.headers.get("Authorization", "").encode("latin-1")):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        sequences = await asyncio.to_thread(self._read_sequences, await self._read_body(request))
        if not sequences:
            return JSONResponse({"scores": []})
        try:
            scores = await asyncio.wait_for(asyncio.wrap_future(self.submit(sequences)), self.timeout_s)
        except TimeoutError as error:
            raise HTTPException(503, "the model is busy", {"Retry-After": "1"}) from error
        if not all(map(math.isfinite, scores)):
            raise HTTPException(500, "the model gave a score that is not finite")
        return JSONResponse({"scores": scores})

    async def _read_body(self, request: Request) -> bytes:
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in request.headers:
            raise HTTPException(411, "Content-Length is needed")
        if int(length) > self.max_request_bytes:
            raise HTTPException(413, f"{length} bytes; at most {self.max_request_bytes} are taken")
        try:
            return await asyncio.wait_for(request.body(), BODY_S)
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, f"the body was not complete after {BODY_S} s") from error

    def _read_sequences(self, body: bytes) -> Sequences:
        """The token ids to score. Raises HTTPException for what is malformed, too large or out of range."""
        try:
            request = msgspec.json.decode(body, type=ScoreRequest)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise HTTPException(400, f"not a request: {error}") from error
        columns = msgspec.structs.asdict(request)
        sizes = {name: len(values) for name, values in columns.items() if isinstance(values, list)}
        if len(set(sizes.values())) != 1:
            raise HTTPException(400, f"columns of different lengths: {sizes}")
        if len(request.completions) > self.max_batch_size:
            what = f"{len(request.completions)} completions; at most {self.max_batch_size} a request"
            raise HTTPException(413, what)
        sequences = self._token_ids(request)
        for i, ids in enumerate(sequences):
            if not 0 < len(ids) <= self.max_length:
                raise HTTPException(400, f"sequence {i} has {len(ids)} tokens; 1 to {self.max_length} are possible")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                raise HTTPException(400, f"sequence {i} has ids outside of 0 to {self.vocab_size - 1}")
        return sequences

    def _token_ids(self, request: ScoreRequest) -> Sequences:
        if request.prompt_ids is not None and request.completion_ids is not None:
            if request.tokenizer is not None and request.tokenizer != self.fingerprint:
                what = f"the ids are of tokenizer {request.tokenizer[:64]!r}, the model's is {self.fingerprint!r}"
                raise HTTPException(409, what)
            return [p + c for p, c in zip(request.prompt_ids, request.completion_ids, strict=True)]
        end = self.tokenizer.eos_token
        pairs = zip(request.prompts, request.completions, strict=True)
        sequences, most = [], self.max_length * CHARACTERS_PER_TOKEN
        for i, (prompt, completion) in enumerate(pairs):
            text = prompt + completion.removesuffix(end) + end
            if len(text) > most:  # to tokenise it could take minutes
                what = f"sequence {i} has {len(text)} characters; at most {self.max_length} tokens are possible"
                raise HTTPException(400, what)
            with self._tokenizer_lock:  # for one text: other requests do not wait for all of them
                sequences += self.tokenizer([text], add_special_tokens=False)["input_ids"]
        return sequences


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """Closes the connection: the rest of a body that was not read must not be taken for the next request."""
    assert isinstance(error, HTTPException)
    headers = {**(error.headers or {}), "Connection": "close"}
    return JSONResponse({"error": error.detail}, error.status_code, headers)


class _Protocol(H11Protocol):
    """Limits what a client can hold, which uvicorn does not.

    Drops a connection that has sent no complete request head HEAD_S after it opened or got its last answer, or that
    does not read for WRITE_S, or sends requests faster than they are answered. When all places are taken, a new
    connection gets that of the oldest one without a token.
    """

    def __init__(self, *args: Any, trusts: Callable[[bytes], bool], **options: Any) -> None:
        super().__init__(*args, **options)
        self.trusts = trusts
        self._unread: asyncio.TimerHandle | None = None

    def is_trusted(self) -> bool:
        """Whether its last request had the token."""
        return self.cycle is not None and self.trusts(dict(self.headers).get(b"authorization", b""))

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.opened = self.loop.time()
        self._await_head()
        live: list[Any] = [c for c in self.connections if c is not self and not c.transport.is_closing()]
        others = [c for c in live if not c.is_trusted()]
        if len(live) >= CONNECTIONS and others:
            min(others, key=lambda c: c.opened).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self.conn.trailing_data[0]) > PIPELINED_BYTES:  # uvicorn would keep all of it
            self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _await_head(self) -> None:
        last = self.cycle

        def drop() -> None:
            if self.cycle is last and (last is None or last.response_complete):
                self.transport.abort()  # does not wait for a client that reads nothing

        self.loop.call_later(HEAD_S, drop)
