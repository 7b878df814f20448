"""The kinds of reward sources: a Python function, HTTP endpoints, or a reward model (which the caller runs).

    examples/rewards/exact_match.py:exact_match     f(prompts, completions, **columns) -> list[float]  (TRL's signature)
    http://a:5000/score,http://b:5000/score         POST {"prompts", "completions", "labels"} -> {"scores"}
    model:checkpoints/rm                            a reward-model checkpoint

A source that fails, or does not give one finite number a completion, causes a RewardError, never a score of 0.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from mrlhf.config.user_file import exception_text, load_module, user_code
from mrlhf.errors import ConfigError, RewardError
from mrlhf.observe.redaction import SECRET_NAME

RewardFunction = Callable[..., list[float]]
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

SOURCE_FORMS = "path/file.py:function, http(s)://host/path[,http(s)://...] or model:DIR"


@dataclass(frozen=True)
class RewardSource:
    """One reward source. Raises ConfigError for a weight that is not a finite number."""

    kind: str
    "function, http or model"
    spec: str
    "file.py:function, comma-separated URLs, or the checkpoint directory"
    weight: float = 1.0
    "factor of this source's scores in the sum"
    name: str = ""
    "in metrics, see `name_sources`"

    def __post_init__(self) -> None:
        is_number = isinstance(self.weight, numbers.Real) and not isinstance(self.weight, bool)
        if not is_number or not math.isfinite(self.weight):
            raise ConfigError(f"weight {self.weight!r} of reward source {self.spec!r} is not a finite number")

    @property
    def urls(self) -> list[str]:
        """The endpoints of an http source."""
        return [url.strip() for url in self.spec.split(",")]


def parse_source(text: str, *, weight: float = 1.0) -> RewardSource:
    """Parses one of the three forms above without opening anything. Raises ConfigError for any other text."""
    text = text.strip()
    if text.startswith("model:"):
        if not text.removeprefix("model:"):
            raise ConfigError(f"reward source {text!r} names no directory", expected="model:DIR")
        return RewardSource("model", text.removeprefix("model:"), weight)
    if text.startswith(("http://", "https://")):
        source = RewardSource("http", text, weight)
        for url in source.urls:
            check_url(url)
        return source
    path, colon, function = text.rpartition(":")
    if colon and path.endswith(".py") and function.isidentifier():
        return RewardSource("function", text, weight)
    raise ConfigError(f"reward source {text!r} is none of the known forms", expected=SOURCE_FORMS)


def name_sources(sources: Sequence[RewardSource]) -> list[RewardSource]:
    """The sources with names that differ: `function:rewards.py:score` and the like, from the end of each spec.

    A name takes as many parts of its path as tell it from all others. Equal sources are numbered: `...#2`.
    """
    paths = [source.spec.rstrip("/").split("/") for source in sources]

    def name(i: int, parts: int) -> str:
        return f"{sources[i].kind}:{'/'.join(paths[i][-parts:])}"

    names: list[str] = []
    for i, path in enumerate(paths):
        others = [k for k in range(len(paths)) if k != i and (sources[k].kind, paths[k]) != (sources[i].kind, path)]
        lengths = range(1, len(path) + 1)
        parts = next((n for n in lengths if all(name(k, n) != name(i, n) for k in others)), len(path))
        names.append(name(i, parts))
    return [replace(source, name=names[i] + (f"#{names[:i].count(names[i]) + 1}" if names[i] in names[:i] else ""))
            for i, source in enumerate(sources)]


def load_function(source: RewardSource) -> RewardFunction:
    """Imports the file of a `function` source and returns its function.

    Raises ConfigError if the file is missing or does not import, if it has no such function (the error lists its
    functions), or if the function cannot be called with prompts, completions and the columns.
    """
    path_text, _, name = source.spec.rpartition(":")
    module = load_module(path_text, what="reward file")
    function = vars(module).get(name)
    if not callable(function) or inspect.isclass(function):
        own = inspect.getmembers(module, lambda f: inspect.isfunction(f) and f.__module__ == module.__name__)
        names = [own_name for own_name, _ in own if not own_name.startswith("_")]
        close = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"reward file {path_text!r} has no function {name!r}",
                          expected=f"one of {', '.join(names)}" if names else "a file that defines a function",
                          fix=f"--reward.sources {path_text}:{close[0]}" if close else None)
    _check_signature(function, source.spec)
    return function


def _check_signature(function: RewardFunction, spec: str) -> None:
    columns = ("label", "prompt_ids", "completion_ids")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a builtin, of which nothing is known
    try:
        signature.bind(**dict.fromkeys(("prompts", "completions", *columns), []))
        return
    except TypeError as error:
        cause = error
    kinds = [p.kind for p in signature.parameters.values()]
    unknown = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in _BY_NAME
               and p.name not in ("prompts", "completions", *columns)]
    fixes = []
    if unknown:
        names = " and ".join(repr(name) for name in unknown)
        what = f"reward function {spec!r} wants {names}, and there is no such column"
        source = f"--label-key {unknown[0]}" if len(unknown) == 1 else "a column `label` with an object of them"
        fixes.append(f"put {names} into the label (preprocess: {source}) and take the parameter `label`")
    else:
        what = f"reward function {spec!r} does not take the columns {', '.join(columns)}: {cause}"
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        fixes.append("add **columns to its parameters")
    raise ConfigError(what, expected="def f(prompts, completions, label, **columns) -> list[float]",
                      fix="; ".join(fixes) or None) from cause


def score_with_function(function: RewardFunction, prompts: Sequence[str], completions: Sequence[str], *,
                        labels: Sequence[Any], prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]],
                        source: str) -> list[float]:
    """One score a completion, from `function(prompts=, completions=, label=, prompt_ids=, completion_ids=)`.

    prompts, completions: decoded texts; the ids are what the model read and wrote. source: the name for errors.
    It may answer with a list, or an array or tensor of one dimension, of numbers or booleans.
    Raises RewardError if the function raises or if its answer is not one finite number a completion.
    """
    if not completions:
        return []
    try:
        with user_code():
            answer = function(prompts=list(prompts), completions=list(completions), label=list(labels),
                              prompt_ids=list(prompt_ids), completion_ids=list(completion_ids))
            answer = _plain(answer)
            if isinstance(answer, list | tuple):
                answer = [float(value) if isinstance(value, bool) else value for value in map(_plain, answer)]
            return check_scores(answer, expected=len(completions), source=source)
    except RewardError:
        raise
    except BaseException as error:  # SystemExit too: the process serves the whole run
        raise RewardError(f"reward function {source!r} raised {exception_text(error)}") from error


def _plain(value: Any) -> Any:
    """Python's numbers for those of NumPy and torch, and lists for their vectors."""
    return value.tolist() if getattr(value, "ndim", None) in (0, 1) and hasattr(value, "tolist") else value


def check_scores(answer: Any, *, expected: int, source: str, first: int = 0) -> list[float]:
    """The answer of a source as floats.

    first: index of the batch's first completion in the whole list, for the index in errors.
    Raises RewardError, with source, index and value, unless it is a list of `expected` finite numbers (and no bools).
    """
    if not isinstance(answer, list | tuple):
        what = f"reward source {source!r} answered with {type(answer).__name__} {shorten(answer)}"
        raise RewardError(what, expected=f"a list of {expected} numbers")
    if len(answer) != expected:
        what = f"{len(answer)} scores for the {expected} completions from index {first}"
        raise RewardError(f"reward source {source!r} answered with {what}",
                          expected="one score a completion, in the same order")
    return [_check_score(value, index=first + i, source=source) for i, value in enumerate(answer)]


def _check_score(value: Any, *, index: int, source: str) -> float:
    if value is None:
        what = f"reward source {source!r} gave no score at index {index}: None"
        raise RewardError(what, expected="a finite number")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        what = f"{type(value).__name__} {shorten(value)}"
        raise RewardError(f"reward source {source!r} gave {what} at index {index}", expected="a finite number")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        what = f"reward source {source!r} gave {shorten(value)} at index {index}"
        raise RewardError(what, expected="a finite number")
    return score


def check_url(url: str) -> None:
    """Raises ConfigError unless `url` is an HTTP endpoint without a secret in it."""
    try:
        parts = urlsplit(url)
        host, user, _ = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise ConfigError(f"reward URL {url!r} is not valid: {error}", expected=SOURCE_FORMS) from error
    if parts.scheme not in ("http", "https") or not host:
        expected = "http(s)://host[:port]/path; separate several by commas"
        raise ConfigError(f"reward URL {url!r} is not valid", expected=expected)
    secrets = ["a user name or password"] if user is not None else []
    secrets += [f"a key ({key}=...)" for key, _ in parse_qsl(parts.query) if SECRET_NAME.search(key)]
    if secrets:
        raise ConfigError(f"the reward URL for {host!r} holds {secrets[0]}, which logs would show",
                          fix="--reward.http_token_env NAME: a bearer token, from the environment")


def shorten(value: Any) -> str:
    """At most 200 characters of a source's answer, quoted if it is a text."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:  # a class of the user's, or an integer of more digits than Python shows
        return f"<{type(value).__name__} that cannot be shown>"
    return repr(text[:200] + "...") if len(text) > 200 else repr(text) if isinstance(value, str) else text
