"""Where rewards come from: a Python function, HTTP endpoints, or a reward model (named here, run by the caller).

    examples/rewards/exact_match.py:exact_match     f(prompts, completions, **columns) -> list[float]  (TRL's signature)
    http://a:5000/score,http://b:5000/score         POST {"prompts", "completions", "labels"} -> {"scores"}
    model:checkpoints/rm                            a reward-model checkpoint

A source that fails, or answers with anything but one finite number a completion, is a RewardError, never a 0.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import math
import numbers
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx

from mrlhf.errors import ConfigError, RewardError
from mrlhf.redaction import SECRET_NAME

RewardFunction = Callable[..., list[float]]

SOURCE_FORMS = "path/file.py:function, http(s)://host/path[,http(s)://...] or model:DIR"
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class RewardSource:
    """One reward source and its weight in the sum. Raises ConfigError for a weight that is not a finite number."""

    kind: str
    "function, http or model"
    spec: str
    "file.py:function, comma-separated URLs, or the checkpoint directory"
    weight: float = 1.0
    "factor of this source's scores in the sum"

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, numbers.Real) or not math.isfinite(self.weight):
            raise ConfigError(f"weight {self.weight!r} of reward source {self.spec!r} is not a finite number")

    @property
    def urls(self) -> list[str]:
        """The endpoints of an http source."""
        return [url.strip() for url in self.spec.split(",")]


def parse_source(text: str, *, weight: float = 1.0) -> RewardSource:
    """Reads one of the three forms above. Opens nothing. Raises ConfigError for any other text."""
    text = text.strip()
    if text.startswith("model:"):
        if not text.removeprefix("model:"):
            raise ConfigError(f"reward source {text!r} names no directory", expected="model:DIR")
        return RewardSource("model", text.removeprefix("model:"), weight)
    if text.startswith(("http://", "https://")):
        source = RewardSource("http", text, weight)
        for url in source.urls:
            _check_url(url)
        return source
    path, colon, function = text.rpartition(":")
    if colon and path.endswith(".py") and function.isidentifier():
        return RewardSource("function", text, weight)
    raise ConfigError(f"reward source {text!r} is none of the known forms", expected=SOURCE_FORMS)


def load_function(source: RewardSource) -> RewardFunction:
    """Imports the file of a `function` source and returns its function.

    Raises ConfigError if the file is missing or does not import, if it has no such function (naming those it has), or if the function
    cannot be called with prompts, completions and the columns.
    """
    path_text, _, name = source.spec.rpartition(":")
    path = Path(path_text).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"reward file {path_text!r} does not exist (looked for {path})", expected="path/file.py:function")
    # named by path: two reward files may share a file name
    module_name = f"mrlhf_reward_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    loader = importlib.machinery.SourceFileLoader(module_name, str(path))
    spec = importlib.machinery.ModuleSpec(module_name, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"reward file {path_text!r} does not import: {type(error).__name__}: {error}") from error

    found = {key: value for key, value in vars(module).items() if callable(value) and not inspect.isclass(value)}
    if name not in found:
        own = sorted(
            key for key, value in found.items() if inspect.isfunction(value) and value.__module__ == module_name and not key.startswith("_")
        )
        close = difflib.get_close_matches(name, own, n=1)
        raise ConfigError(
            f"reward file {path_text!r} has no function {name!r}",
            expected=f"one of {', '.join(own)}" if own else "a file that defines a function",
            fix=f"did you mean {path_text}:{close[0]} ?" if close else None,
        )
    function = found[name]
    try:
        inspect.signature(function).bind(prompts=[], completions=[], label=[], prompt_ids=[], completion_ids=[])
    except TypeError as error:
        raise ConfigError(
            f"reward function {source.spec!r} cannot be called with the columns label, prompt_ids, completion_ids: {error}",
            expected="def f(prompts, completions, **columns) -> list[float]",
            fix="add **columns to its parameters",
        ) from error
    return function


def score_with_function(
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    labels: Sequence[Any],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    source: str,
) -> list[float]:
    """One score a completion from `function(prompts=, completions=, label=, prompt_ids=, completion_ids=)`.

    prompts, completions: decoded texts; the ids are those the model saw and wrote. `source` names the function in errors.
    Raises RewardError if the function raises or if its answer is not one finite number a completion.
    """
    if not completions:
        return []
    try:
        answer = function(
            prompts=list(prompts),
            completions=list(completions),
            label=list(labels),
            prompt_ids=list(prompt_ids),
            completion_ids=list(completion_ids),
        )
    except Exception as error:
        raise RewardError(f"reward function {source!r} raised {type(error).__name__}: {error}") from error
    return check_scores(answer, expected=len(completions), source=source)


def check_scores(answer: Any, *, expected: int, source: str, first: int = 0) -> list[float]:
    """The answer of a source as floats.

    first: index of the batch's first completion, so that errors give the index in the whole list.
    Raises RewardError, naming source, index and value, unless it is a list of `expected` finite numbers (a bool is none).
    """
    if not isinstance(answer, list | tuple):
        raise RewardError(
            f"reward source {source!r} answered with {type(answer).__name__} {_short(answer)}", expected=f"a list of {expected} numbers"
        )
    if len(answer) != expected:
        raise RewardError(
            f"reward source {source!r} answered with {len(answer)} scores for the {expected} completions from index {first}",
            expected="one score a completion, in the same order",
        )
    return [_check_score(value, index=first + i, source=source) for i, value in enumerate(answer)]


def combine(parts: list[tuple[float, list[float]]]) -> list[float]:
    """The weighted sum of several sources' scores: [(weight, scores), ...] -> scores. Raises RewardError if the lengths differ."""
    if not parts:
        raise RewardError("there is no reward source to combine")
    lengths = [len(scores) for _, scores in parts]
    if len(set(lengths)) > 1:
        raise RewardError(f"reward sources answered with different numbers of scores: {lengths}")
    weights = [weight for weight, _ in parts]
    rows = zip(*(scores for _, scores in parts), strict=True)
    return [math.fsum(weight * score for weight, score in zip(weights, row, strict=True)) for row in rows]


class HttpReward:
    """Scores from HTTP endpoints that hold the same reward function.

    Each batch is one POST of {"prompts": [...], "completions": [...], "labels": [...]}, answered by {"scores": [...]}. Batches go round
    the endpoints in turn, several at once; a batch that meets a network error, a time-out or a status of RETRIED_STATUS is sent
    again to the next endpoint after backoff_s, 2 backoff_s, 4 backoff_s, ... (30 s at most). Other failures are not retried.

    timeout_s: to connect, and for each wait for bytes. retries: sends after the first. batch_size: completions a request.
    concurrency: requests in flight. token_env: environment variable with a bearer token. first_endpoint: where the turn starts; the
    data-parallel rank, so that ranks do not all begin with the same endpoint.

    Raises ConfigError for a bad URL, number or missing token; `score` raises RewardError.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 60.0,
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
            _check_url(url)
        at_least = (("batch_size", batch_size, 1), ("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff_s", backoff_s, 0))
        for name, number, smallest in at_least:
            if number < smallest:
                raise ConfigError(f"reward {name} = {number}", expected=f"at least {smallest}")
        if not timeout_s > 0:
            raise ConfigError(f"reward timeout_s = {timeout_s}", expected="seconds > 0")
        headers = {}
        if token_env is not None:
            if not os.environ.get(token_env):
                raise ConfigError(
                    f"environment variable {token_env} with the reward server's token is not set", fix=f"export {token_env}=..."
                )
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self.urls, self.retries, self.backoff_s, self.batch_size, self.concurrency = list(urls), retries, backoff_s, batch_size, concurrency
        self._next_endpoint = first_endpoint
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.Client(timeout=timeout_s, headers=headers, limits=limits)

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, labels: Sequence[Any]) -> list[float]:
        """One score a completion, in order.

        Raises RewardError naming the endpoint when a batch has failed after all retries or was answered wrongly; the other batches
        are then given up.
        """
        if not len(prompts) == len(completions) == len(labels):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(labels)} labels")
        starts = range(0, len(completions), self.batch_size)
        turn = self._next_endpoint
        self._next_endpoint += len(starts)
        give_up = threading.Event()

        def send(number_and_start: tuple[int, int]) -> list[float]:
            number, start = number_and_start
            part = slice(start, start + self.batch_size)
            payload = {"prompts": list(prompts[part]), "completions": list(completions[part]), "labels": list(labels[part])}
            try:
                return self._send_batch(payload, turn=turn + number, first=start, give_up=give_up)
            except BaseException:
                give_up.set()
                raise

        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="reward") as pool:
            futures = [pool.submit(send, item) for item in enumerate(starts)]
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

    def _send_batch(self, payload: dict[str, list], *, turn: int, first: int, give_up: threading.Event) -> list[float]:
        cause: httpx.RequestError | None
        for attempt in range(self.retries + 1):
            pause_s = min(self.backoff_s * 2 ** (attempt - 1), LONGEST_PAUSE_S) if attempt else 0.0
            if give_up.wait(pause_s):
                raise _GivenUp("given up after the failure of another batch")
            url = self.urls[(turn + attempt) % len(self.urls)]
            try:
                response = self._client.post(url, json=payload)
            except httpx.RequestError as error:
                failure, cause = f"{type(error).__name__}: {error}", error
                continue
            if response.status_code == 200:
                return _read_scores(response, expected=len(payload["completions"]), source=url, first=first)
            failure, cause = f"status {response.status_code}: {_short(response.text)}", None
            if response.status_code not in RETRIED_STATUS:
                break
        where = f"the {len(payload['completions'])} completions from index {first}, try {attempt + 1}"
        raise RewardError(f"reward source {url!r} failed for {where}: {failure}") from cause


class _GivenUp(RewardError):
    """A batch stopped because another one has failed."""


def _read_scores(response: httpx.Response, *, expected: int, source: str, first: int) -> list[float]:
    try:
        answer = response.json()
    except ValueError as error:
        raise RewardError(
            f"reward source {source!r} answered with no JSON: {_short(response.text)}", expected='{"scores": [...]}'
        ) from error
    if not isinstance(answer, dict) or "scores" not in answer:
        raise RewardError(f"reward source {source!r} answered without 'scores': {_short(answer)}", expected='{"scores": [...]}')
    return check_scores(answer["scores"], expected=expected, source=source, first=first)


def _check_score(value: Any, *, index: int, source: str) -> float:
    if value is None:
        raise RewardError(f"reward source {source!r} gave no score at index {index}: None", expected="a finite number")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward source {source!r} gave {type(value).__name__} {_short(value)} at index {index}", expected="a finite number"
        )
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise RewardError(f"reward source {source!r} gave {_short(value)} at index {index}", expected="a finite number")
    return score


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, user, _ = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise ConfigError(f"reward URL {url!r} is not valid: {error}", expected=SOURCE_FORMS) from error
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"reward URL {url!r} is not valid", expected="http(s)://host[:port]/path; several are separated by commas")
    if user is not None:
        raise ConfigError(
            f"the reward URL for {host!r} holds a user name or password, which logs would show",
            fix="pass a bearer token by an environment variable",
        )
    secret = next((key for key, _ in parse_qsl(parts.query) if SECRET_NAME.search(key)), None)
    if secret is not None:
        raise ConfigError(
            f"the reward URL for {host!r} holds a secret ({secret}=...), which logs would show",
            fix="pass a bearer token by an environment variable",
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:200] + "...") if len(text) > 200 else repr(text) if isinstance(value, str) else text
