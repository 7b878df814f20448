"""Scores from HTTP endpoints: batches in flight over several servers, with time-outs, retries and limits, and never a made-up score.

    POST {"prompts", "completions", "labels", "prompt_ids", "completion_ids", "tokenizer"}     answered by     {"scores": [...]}

What is sent again: connection errors, time-outs, status 429 and 5xx, and answers that are none (no JSON, another number of scores, NaN),
since those too come from a server that is being restarted or overloaded. Any other status is final.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from mrlhf.errors import ConfigError, RewardError
from mrlhf.observe.redaction import redact
from mrlhf.rl.rewards.kinds import check_scores, check_url, short

LONGEST_PAUSE_S = 30.0
CONNECT_S = 10.0  # a server that is there takes the connection at once
ANSWER_BYTES = (1 << 16, 64)  # of an answer: in all, and for each score
FAILURES_TO_OPEN, OPEN_S = 3, 20.0


class Endpoints:
    """Which server a request goes to: the one with the fewest requests in flight, in turn where equal.

    One that has failed FAILURES_TO_OPEN times in a row is left alone for OPEN_S seconds (its circuit is open) as long as another is there;
    then one request tries it again. Used by several threads.
    """

    def __init__(self, urls: Sequence[str], *, first: int = 0) -> None:
        self._states = [_Endpoint(url) for url in urls]
        self._turn, self._lock = first, threading.Lock()

    def take(self, *, avoid: str | None = None) -> str:
        """The next server; `avoid` the one that has just failed, if there is another."""
        with self._lock:
            now, count = time.monotonic(), len(self._states)
            order = [self._states[(self._turn + i) % count] for i in range(count)]
            usable = [e for e in order if e.open_until <= now] or [min(order, key=lambda e: e.open_until)]
            usable = [e for e in usable if e.url != avoid] or usable
            chosen = min(usable, key=lambda e: e.in_flight)
            self._turn = self._states.index(chosen) + 1
            chosen.in_flight += 1
            if chosen.failures >= FAILURES_TO_OPEN:
                chosen.open_until = now + OPEN_S  # half open: the others wait for what this request finds
            return chosen.url

    def give_back(self, url: str, *, failed: bool) -> None:
        """The request to `url` is over."""
        with self._lock:
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
    """Scores from endpoints that hold the same reward function.

    timeout_s: for one request; a server that sends its answer byte by byte is cut off too. total_s: for a batch with all its retries.
    retries: sends after the first, to another endpoint if there is one, after backoff_s, 2 backoff_s, ... (30 s at most, half of it random)
    or after what the server's Retry-After asks for. batch_size: completions a request. concurrency: requests in flight.
    token_env: environment variable with a bearer token. first_endpoint: where the turn starts.

    Raises ConfigError for a bad URL, number or missing token; `score` raises RewardError.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 30.0,
        total_s: float = 600.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        batch_size: int = 64,
        concurrency: int = 8,
        token_env: str | None = None,
        first_endpoint: int = 0,
    ):
        if not urls:
            raise ConfigError("an HTTP reward needs at least one URL")
        for url in urls:
            check_url(url)
        at_least = (("batch_size", batch_size, 1), ("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff_s", backoff_s, 0))
        for name, number, smallest in at_least:
            if number < smallest:
                raise ConfigError(f"reward {name} = {number}", expected=f"at least {smallest}")
        for name, seconds in (("timeout_s", timeout_s), ("total_s", total_s)):
            if not seconds > 0:
                raise ConfigError(f"reward {name} = {seconds}", expected="seconds > 0")
        headers = {"Accept-Encoding": "identity"}  # else the size of an answer is not what was read
        self._token = os.environ.get(token_env) if token_env else None
        if token_env is not None:
            if not self._token:
                raise ConfigError(
                    f"environment variable {token_env} with the reward server's token is not set", fix=f"export {token_env}=..."
                )
            headers["Authorization"] = f"Bearer {self._token}"
        self.retries, self.backoff_s, self.batch_size, self.concurrency = retries, backoff_s, batch_size, concurrency
        self.timeout_s, self.total_s = timeout_s, total_s
        self._endpoints = Endpoints(urls, first=first_endpoint)
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        self._client = httpx.Client(timeout=timeout, headers=headers, limits=limits, follow_redirects=False)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        labels: Sequence[Any],
        prompt_ids: Sequence[list[int]] | None = None,
        completion_ids: Sequence[list[int]] | None = None,
        tokenizer: str | None = None,
    ) -> list[float]:
        """One score a completion, in order.

        The ids are what the model saw and wrote, `tokenizer` the fingerprint of theirs, for a server that scores them with the same one.
        Raises RewardError naming the endpoint when a batch has failed after all retries; the other batches are then given up.
        """
        columns = {"prompts": prompts, "completions": completions, "labels": labels}
        if prompt_ids is not None and completion_ids is not None:
            columns |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"columns of different lengths: {sizes}")
        give_up = threading.Event()

        def send(start: int) -> list[float]:
            batch: dict[str, Any] = {name: list(values[start : start + self.batch_size]) for name, values in columns.items()}
            if tokenizer is not None and "prompt_ids" in batch:
                batch["tokenizer"] = tokenizer
            try:
                return self._send_batch(batch, first=start, give_up=give_up)
            except BaseException:
                give_up.set()
                raise

        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="reward") as pool:
            futures = [pool.submit(send, start) for start in range(0, len(completions), self.batch_size)]
            try:
                wait(futures)
            finally:
                give_up.set()  # after Ctrl-C, leaving the pool would otherwise wait for all retries
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            # batches that were given up only echo the failure that stopped them
            raise min(failures, key=lambda error: isinstance(error, _GivenUp))
        return [score for future in futures for score in future.result()]

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> HttpReward:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _send_batch(self, batch: dict[str, Any], *, first: int, give_up: threading.Event) -> list[float]:
        count, deadline = len(batch["completions"]), time.monotonic() + self.total_s
        body, url, failure = _Body(json.dumps(batch).encode()), None, _Failure("not sent", final=False)
        for attempt in range(1, self.retries + 2):
            if give_up.is_set():
                raise _GivenUp("given up after the failure of another batch")
            url = self._endpoints.take(avoid=url)
            outcome: list[float] | _Failure = _Failure("interrupted", final=True)
            try:
                outcome = self._ask(url, body, count, first)
            finally:
                self._endpoints.give_back(url, failed=isinstance(outcome, _Failure))
            if not isinstance(outcome, _Failure):
                return outcome
            failure = outcome
            pause_s = max(failure.retry_after_s, min(self.backoff_s * 2 ** (attempt - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))
            if failure.final or attempt == self.retries + 1:
                break
            if time.monotonic() + pause_s >= deadline:
                failure = _Failure(
                    f"{failure.what}; the next try would end after {self.total_s:g} s", final=True, expected=failure.expected
                )
                break
            if give_up.wait(pause_s):
                raise _GivenUp("given up after the failure of another batch")
        where = f"the {count} completions from index {first}, try {attempt}"
        raise RewardError(f"reward source {url!r} failed for {where}: {failure.what}", expected=failure.expected)

    def _ask(self, url: str, body: _Body, count: int, first: int) -> list[float] | _Failure:
        """One request. What the server says comes into errors without our token, which it may echo."""
        end, most, content = time.monotonic() + self.timeout_s, ANSWER_BYTES[0] + ANSWER_BYTES[1] * count, bytearray()
        headers = {"Content-Type": "application/json", "Idempotency-Key": body.key}
        try:
            with self._client.stream("POST", url, content=body.data, headers=headers) as response:
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > most:
                        return _Failure(f"an answer of more than {most:,} bytes", final=False)
                    if time.monotonic() > end:
                        return _Failure(f"its answer was not whole after {self.timeout_s:g} s", final=False)
        except (httpx.TimeoutException, httpx.NetworkError, httpx.ProtocolError) as error:
            return _Failure(f"{type(error).__name__}: {self._clean(str(error))}", final=False)
        except httpx.RequestError as error:
            return _Failure(f"{type(error).__name__}: {self._clean(str(error))}", final=True)
        text = content.decode("utf-8", "replace")
        if response.status_code != 200:
            status, passing = response.status_code, response.status_code == 429 or response.status_code >= 500
            moved = "; redirects are not followed" if response.is_redirect else ""
            wait_s = _retry_after(response.headers.get("Retry-After")) if passing else 0.0
            return _Failure(f"status {status}: {short(self._clean(text))}{moved}", final=not passing, retry_after_s=wait_s)
        try:
            return _read_scores(text, expected=count, source=url, first=first)
        except RewardError as error:
            return _Failure(self._clean(error.what), final=False, expected=error.expected)

    def _clean(self, text: str) -> str:
        return redact(text.replace(self._token, "<redacted>") if self._token else text)


@dataclass(frozen=True)
class _Body:
    """A request, and the key by which a server can tell that it has come before."""

    data: bytes
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class _Failure:
    """Why a request gave no scores; `final` where another try would be no use."""

    what: str
    final: bool
    retry_after_s: float = 0.0
    expected: str | None = None


class _GivenUp(RewardError):
    """A batch stopped because another one has failed."""


def _retry_after(header: str | None) -> float:
    """Seconds to wait; 0 where the server does not say, or says nonsense."""
    if not header:
        return 0.0
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _read_scores(text: str, *, expected: int, source: str, first: int) -> list[float]:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"reward source {source!r} answered with no JSON: {short(text)}", expected='{"scores": [...]}') from error
    if not isinstance(answer, dict) or "scores" not in answer:
        raise RewardError(f"reward source {source!r} answered without 'scores': {short(answer)}", expected='{"scores": [...]}')
    return check_scores(answer["scores"], expected=expected, source=source, first=first)
