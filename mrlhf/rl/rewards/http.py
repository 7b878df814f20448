"""Scores from HTTP endpoints: batches in flight to several servers, with time-outs, retries and limits.

    POST {"prompts", "completions", "labels", "prompt_ids", "completion_ids", "tokenizer"}  ->  {"scores": [...]}

A request is sent again after a connection error, a time-out, status 429 or 5xx, or a malformed answer (no JSON, a wrong
number of scores, NaN), which a server gives while it restarts or is overloaded. Any other status is final. A failure is
an error, never a score.

Requests are tasks of an event loop in a thread of its own, because a task can be cancelled wherever it waits: one
deadline holds for the whole of a request, from the name's look-up to the last byte.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from mrlhf.errors import ConfigError, RewardError
from mrlhf.observe.redaction import redact
from mrlhf.rl.rewards.kinds import check_scores, check_url, shorten

LONGEST_PAUSE_S = 30.0
CONNECT_S = 10.0  # a running server accepts the connection at once
CLOSE_S = 5.0  # to close the connections
ANSWER_BYTES, ANSWER_BYTES_PER_SCORE = 1 << 16, 64  # the largest answer: their sum
FAILURES_TO_OPEN, OPEN_S = 3, 20.0


class Endpoints:
    """Chooses the server with the fewest requests in flight, in turn among equal ones.

    A server that has failed FAILURES_TO_OPEN times in a row gets no request for OPEN_S seconds (its circuit is open) if
    another server is usable; then one request tries it again.
    """

    def __init__(self, urls: Sequence[str], *, first: int = 0) -> None:
        self._states = [_Endpoint(url) for url in urls]
        self._turn = first

    def take(self, *, avoid: str | None = None) -> str:
        """The next server. avoid: one that has just failed; it is chosen only if there is no other."""
        now, count = time.monotonic(), len(self._states)
        order = [self._states[(self._turn + i) % count] for i in range(count)]
        usable = [e for e in order if e.open_until <= now] or [min(order, key=lambda e: e.open_until)]
        usable = [e for e in usable if e.url != avoid] or usable
        chosen = min(usable, key=lambda e: e.in_flight)
        self._turn = self._states.index(chosen) + 1
        chosen.in_flight += 1
        if chosen.failures >= FAILURES_TO_OPEN:
            chosen.open_until = now + OPEN_S  # half open: other requests wait for the result of this one
        return chosen.url

    def give_back(self, url: str, *, failed: bool) -> None:
        """Records the end of a request to `url`."""
        endpoint = next(e for e in self._states if e.url == url)
        endpoint.in_flight -= 1
        endpoint.failures = endpoint.failures + 1 if failed else 0
        endpoint.open_until = time.monotonic() + OPEN_S if endpoint.failures >= FAILURES_TO_OPEN else 0.0


@dataclass
class _Endpoint:
    url: str
    in_flight: int = 0
    failures: int = 0
    open_until: float = 0.0


class HttpReward:
    """Scores from endpoints that all serve the same reward function. Any thread may call it.

    timeout_s: for one request, however slowly its parts come. total_s: for a batch with all its retries.
    retries: further tries, at another endpoint if there is one, after backoff_s, 2 backoff_s, ... (at most 30 s, half
    of it random) or after the server's Retry-After. batch_size: completions a request. concurrency: requests in flight.
    token_env: environment variable with a bearer token. first_endpoint: index of the endpoint that is used first.

    Raises ConfigError for a bad URL, a number out of range or a missing token; `score` raises RewardError.
    """

    def __init__(self, urls: Sequence[str], *, timeout_s: float = 30.0, total_s: float = 600.0, retries: int = 4,
                 backoff_s: float = 0.5, batch_size: int = 64, concurrency: int = 8, token_env: str | None = None,
                 first_endpoint: int = 0):
        if not urls:
            raise ConfigError("an HTTP reward needs at least one URL")
        for url in urls:
            check_url(url)
        minima = {"batch_size": (batch_size, 1), "concurrency": (concurrency, 1), "retries": (retries, 0),
                  "backoff_s": (backoff_s, 0)}
        for name, (number, minimum) in minima.items():
            if number < minimum:
                raise ConfigError(f"reward {name} = {number}", expected=f"at least {minimum}")
        for name, seconds in (("timeout_s", timeout_s), ("total_s", total_s)):
            if not seconds > 0:
                raise ConfigError(f"reward {name} = {seconds}", expected="seconds > 0")
        # ANSWER_BYTES limits the bytes that are read
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        self._token = None if token_env is None else _read_token(token_env)
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        self.retries, self.backoff_s, self.batch_size, self.concurrency = retries, backoff_s, batch_size, concurrency
        self.timeout_s, self.total_s = timeout_s, total_s
        self._endpoints = Endpoints(urls, first=first_endpoint)
        self._slots = asyncio.Semaphore(concurrency)
        # a connection for each request: what a server sends beyond an answer is never taken for the next answer
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=min(timeout_s, CONNECT_S))
        self._client = _make_client(urls, timeout=timeout, headers=headers, limits=limits, follow_redirects=False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="rewards")
        self._thread.start()

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, labels: Sequence[Any],
              prompt_ids: Sequence[list[int]] | None = None, completion_ids: Sequence[list[int]] | None = None,
              tokenizer: str | None = None) -> list[float]:
        """One score a completion, in order.

        The ids are what the model read and wrote, `tokenizer` is the fingerprint of their tokenizer: a server with the
        same tokenizer scores the ids. Raises RewardError, which names the endpoint, when a batch has failed after all
        retries; the other batches are then given up.
        """
        columns = {"prompts": prompts, "completions": completions, "labels": labels}
        if prompt_ids is not None and completion_ids is not None:
            columns |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"columns of different lengths: {sizes}")
        future = asyncio.run_coroutine_threadsafe(self._score_batches(columns, tokenizer), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # after Ctrl-C

    def close(self) -> None:
        if self._loop.is_closed():
            return
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> HttpReward:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _score_batches(self, columns: dict[str, Sequence[Any]], tokenizer: str | None) -> list[float]:
        tasks = []
        for start in range(0, len(columns["completions"]), self.batch_size):
            batch: dict[str, Any] = {name: list(v[start : start + self.batch_size]) for name, v in columns.items()}
            if tokenizer is not None and "prompt_ids" in batch:
                batch["tokenizer"] = tokenizer
            tasks.append(asyncio.create_task(self._send_batch(batch, first=start)))
        try:
            parts = await asyncio.gather(*tasks)
        finally:  # one has failed: the others are given up
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [score for part in parts for score in part]

    async def _send_batch(self, batch: dict[str, Any], *, first: int) -> list[float]:
        async with self._slots:
            count, deadline = len(batch["completions"]), time.monotonic() + self.total_s
            body, url, failure = _Body(json.dumps(batch).encode()), None, _Failure("not sent", final=False)
            for attempt in range(1, self.retries + 2):
                url = self._endpoints.take(avoid=url)
                outcome: list[float] | _Failure = _Failure("interrupted", final=True)
                try:
                    limit_s = min(self.timeout_s, deadline - time.monotonic())
                    outcome = await self._send_request(url, body, count, first, limit_s)
                finally:
                    self._endpoints.give_back(url, failed=isinstance(outcome, _Failure))
                if not isinstance(outcome, _Failure):
                    return outcome
                failure = outcome
                backoff_s = min(self.backoff_s * 2 ** (attempt - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                pause_s = max(failure.retry_after_s, backoff_s)
                if failure.final or attempt == self.retries + 1:
                    break
                if time.monotonic() + pause_s >= deadline:
                    what = f"{failure.what}; the next try would end after {self.total_s:g} s"
                    failure = _Failure(what, final=True, expected=failure.expected)
                    break
                await asyncio.sleep(pause_s)
        where = f"the {count} completions from index {first}, try {attempt}"
        raise RewardError(f"reward source {url!r} failed for {where}: {failure.what}", expected=failure.expected)

    async def _send_request(
        self, url: str, body: _Body, count: int, first: int, limit_s: float
    ) -> list[float] | _Failure:
        """One try. The server may echo our token: `_clean` takes it out of the texts that go into errors."""
        content, most = bytearray(), ANSWER_BYTES + ANSWER_BYTES_PER_SCORE * count
        headers = {"Content-Type": "application/json", "Idempotency-Key": body.key}
        try:
            async with (
                asyncio.timeout(limit_s),
                self._client.stream("POST", url, content=body.data, headers=headers) as response,
            ):
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > most:
                        return _Failure(f"an answer of more than {most:,} bytes", final=False)
        except TimeoutError:
            return _Failure(f"its answer was not whole after {round(limit_s, 2):g} s", final=False)
        except (httpx.TimeoutException, httpx.NetworkError, httpx.ProtocolError) as error:
            return _Failure(f"{type(error).__name__}: {self._clean(str(error))}", final=False)
        except httpx.RequestError as error:
            return _Failure(f"{type(error).__name__}: {self._clean(str(error))}", final=True)
        text = content.decode("utf-8", "replace")
        if response.status_code != 200:
            return self._status_failure(response, text)
        try:
            return _read_scores(text, expected=count, source=url, first=first)
        except RewardError as error:
            return _Failure(self._clean(error.what), final=False, expected=error.expected)

    def _status_failure(self, response: httpx.Response, text: str) -> _Failure:
        status = response.status_code
        temporary = status == 429 or status >= 500
        redirect = "; redirects are not followed" if response.is_redirect else ""
        retry_after_s = _retry_after(response.headers.get("Retry-After")) if temporary else 0.0
        what = f"status {status}: {shorten(self._clean(text))}{redirect}"
        return _Failure(what, final=not temporary, retry_after_s=retry_after_s)

    def _clean(self, text: str) -> str:
        return redact(text.replace(self._token, "<redacted>") if self._token else text)


@dataclass(frozen=True)
class _Body:
    """A request, with the key by which a server can recognise a retry."""

    data: bytes
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class _Failure:
    """Why a request gave no scores. final: another try cannot succeed."""

    what: str
    final: bool
    retry_after_s: float = 0.0
    expected: str | None = None


def _make_client(urls: Sequence[str], **options: Any) -> httpx.AsyncClient:
    """Raises ConfigError where the environment's proxy or certificates, or a URL, cannot be used."""
    try:
        client = httpx.AsyncClient(**options)
    except (ImportError, OSError, ValueError) as error:
        what = f"no HTTP client for the reward source: {type(error).__name__}: {error}"
        raise ConfigError(what, expected="proxies (HTTP_PROXY, ALL_PROXY, ...) and certificates (SSL_CERT_FILE, "
                          "SSL_CERT_DIR) in the environment that can be used") from error
    for url in urls:
        try:
            client.build_request("POST", url)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"reward URL {url!r} is not valid: {error}", expected="http(s)://host/path") from error
    return client


def _read_token(variable: str) -> str:
    token = os.environ.get(variable)
    if not token:
        what = f"environment variable {variable} with the reward server's token is not set"
        raise ConfigError(what, fix=f"export {variable}=...")
    return token


def _retry_after(header: str | None) -> float:
    """Seconds to wait; 0 without the header or if it is malformed."""
    if not header:
        return 0.0
    if header.strip().isascii() and header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _read_scores(text: str, *, expected: int, source: str, first: int) -> list[float]:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"reward source {source!r} answered with no JSON: {shorten(text)}"
        raise RewardError(what, expected='{"scores": [...]}') from error
    if not isinstance(answer, dict) or "scores" not in answer:
        what = f"reward source {source!r} answered without 'scores': {shorten(answer)}"
        raise RewardError(what, expected='{"scores": [...]}')
    return check_scores(answer["scores"], expected=expected, source=source, first=first)
