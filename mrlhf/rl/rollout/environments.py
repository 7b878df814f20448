"""Conversations between the model and an environment (tools, games, simulated users): `rollout.environment: file.py:Class`.

    class Class:
        def reset(self, record): ...                     # {"prompt": text, "label": the prompt's label}; one object a conversation
        def step(self, messages, text): ...              # -> (observation, reward, done)

`text` is what the model wrote in this turn, `messages` the conversation so far with it: the prompt as one message of the role "prompt",
then assistant's and observed messages. An observation is a message, a list of messages (the chat template puts them in, followed by
its generation prompt), or a string, which goes on within the model's turn where a stop string ended it. Conversations take their turns
together: what is still going on is answered by one call of vLLM, then by the environment in threads. Token ids travel; only new text
is tokenised.
"""

from __future__ import annotations

import inspect
import math
import numbers
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch.distributed as dist

from mrlhf.config.user_file import load_module
from mrlhf.data.prepare.template import Template
from mrlhf.data.tokenizers.special import Rendered
from mrlhf.errors import ConfigError, DataError, MrlhfError, ToolError
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling, VLLMEngine

Message = dict[str, Any]
Seed = Callable[[int, int], int]
_BEFORE = [{"role": "user", "content": "a0b1"}, {"role": "assistant", "content": "c2d3"}]


def load_class(spec: str) -> type:
    """The class of `file.py:Class`. Raises ConfigError where it is none, or has no reset(record) or step(messages, text)."""
    path, colon, name = spec.rpartition(":")
    if not (colon and path.endswith(".py") and name.isidentifier()):
        raise ConfigError(f"rollout.environment = {spec!r}", where="rollout.environment", expected="path/file.py:Class")
    module = load_module(path, what="environment file")
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        own = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        raise ConfigError(
            f"{path} has no class {name!r}", where="rollout.environment", expected=", ".join(own) or "a file that defines a class"
        )
    for method, arguments in (("reset", (None, {})), ("step", (None, [], ""))):
        try:
            inspect.signature(getattr(found, method)).bind(*arguments)
        except (AttributeError, TypeError) as error:
            expected = "reset(self, record) and step(self, messages, text)"
            raise ConfigError(f"{spec}: {error}", where="rollout.environment", expected=expected) from error
    return found


@dataclass(frozen=True)
class Outcome:
    """Of one step: the observation's messages (or text), its token ids, the reward, and whether the conversation is over."""

    observed: list[Message] | str
    ids: list[int]
    reward: float
    done: bool


@dataclass
class Talk:
    """One conversation while it goes on; `tokens`, `logps`, `observed` as in Answer."""

    environment: Any
    label: Any
    prompt: list[int]
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    observed: list[tuple[int, int]] = field(default_factory=list)
    reward: float = 0.0
    turns: int = 0
    over: bool = False

    def hear(self, answer: Answer, text: str) -> None:
        self.tokens += answer.tokens
        self.logps += answer.logps
        self.turns += 1
        self.messages.append({"role": "assistant", "content": text})

    def observe(self, outcome: Outcome) -> None:
        self.observed.append((len(self.tokens), len(self.tokens) + len(outcome.ids)))
        self.tokens += outcome.ids
        seen = outcome.observed
        self.messages += [{"role": "observation", "content": seen}] if isinstance(seen, str) else seen

    def answer(self) -> Answer:
        return Answer(self.tokens, self.logps, self.over, tuple(self.observed), self.reward, self.turns)


class Environments:
    """The environments of one vLLM replica. They live on its first rank; `group` carries what they say to the others (None: it is alone).

    stop_ids: what closes the model's turn; other stop tokens and strings only interrupt it. max_turns: the model's, a conversation.
    threads: steps at once. timeout_s: of one round of steps, all conversations together.
    """

    def __init__(
        self,
        spec: str,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        max_turns: int,
        threads: int,
        timeout_s: float,
        group: dist.ProcessGroup | None = None,
        first_rank: int = 0,
    ) -> None:
        self.spec, self.cls, self.tokenizer = spec, load_class(spec), tokenizer
        self.stop_ids, self.max_turns, self.threads, self.timeout_s = frozenset(stop_ids), max_turns, threads, timeout_s
        self.group, self.first_rank = group, first_rank
        self.template = Template(tokenizer) if tokenizer.chat_template else None

    def converse(
        self, engine: VLLMEngine, prompts: Sequence[list[int]], labels: Sequence[Any], seed: Seed, sampling: Sampling
    ) -> list[Answer]:
        """One conversation a prompt; `seed(i, turn)` decides the model's turn of the i-th.

        Of at most `max_turns` turns and sampling.max_new_tokens tokens, observations included. A turn that the token limit cuts ends
        the conversation and is not shown to the environment. All ranks of a replica call this together. Raises ToolError on all.
        """
        talks = [
            Talk(None, label, prompt, [{"role": "prompt", "content": self.tokenizer.decode(prompt)}])
            for prompt, label in zip(prompts, labels, strict=True)
        ]
        self._on_first_rank(self._reset, talks)
        going = list(range(len(talks)))
        for turn in range(self.max_turns):
            if not going:
                break
            room = [sampling.max_new_tokens - len(talks[i].tokens) for i in going]
            answers = engine.generate([talks[i].prompt + talks[i].tokens for i in going], [seed(i, turn) for i in going], sampling, room)
            for i, answer in zip(going, answers, strict=True):
                talks[i].hear(answer, self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            heard = [i for i, answer in zip(going, answers, strict=True) if answer.stopped]
            going = []
            for i, outcome in zip(heard, self._on_first_rank(self._step, [talks[i] for i in heard]), strict=True):
                talks[i].reward += outcome.reward
                talks[i].over = outcome.done
                if not outcome.done and turn + 1 < self.max_turns and len(talks[i].tokens) + len(outcome.ids) < sampling.max_new_tokens:
                    talks[i].observe(outcome)
                    going.append(i)
        return [talk.answer() for talk in talks]

    # ------------------------------------------------------------------ the user's code

    def _reset(self, talk: Talk) -> None:
        talk.environment = self.cls()
        talk.environment.reset({"prompt": talk.messages[0]["content"], "label": talk.label})

    def _step(self, talk: Talk) -> Outcome:
        answer = talk.environment.step(list(talk.messages), talk.messages[-1]["content"])
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise self._wrong(f"step returned {answer!r}"[:300], "(observation, reward, done)")
        observed, reward, done = answer
        if isinstance(reward, bool) or not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise self._wrong(f"step returned the reward {reward!r}", "a finite number")
        if not isinstance(done, bool):
            raise self._wrong(f"step returned done = {done!r}", "True or False")
        if done:
            return Outcome([], [], float(reward), True)
        observed = [observed] if isinstance(observed, dict) else observed
        return Outcome(observed, self._ids(observed, closed=talk.tokens[-1] in self.stop_ids), float(reward), False)

    def _ids(self, observed: Any, *, closed: bool) -> list[int]:
        """What stands between the model's turn, which it has `closed` or not, and its next one."""
        if isinstance(observed, str):
            if closed or not observed:
                what = (
                    "an empty observation"
                    if not closed
                    else f"the observation {observed[:100]!r} is a string, and the model's turn is over"
                )
                raise self._wrong(what, "a message, or a text that goes on after a stop string (rollout.stop)")
            return self.tokenizer(observed, add_special_tokens=False)["input_ids"]
        if (
            not isinstance(observed, list)
            or not observed
            or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in observed)
        ):
            raise self._wrong(f"step returned the observation {observed!r}"[:300], "a message {role, content}, a list of them, or a string")
        if self.template is None:
            raise self._wrong("the tokenizer has no chat template to put messages in", "one, or observations that are strings")
        try:
            rendered = self.template.prompt([*_BEFORE, *observed])
            start = rendered.text.index("c2d3") + 4
            end = self.template.end_token or ""
            if closed and end and rendered.text.startswith(end, start):
                start += len(end)
            literal = tuple((a - start, b - start) for a, b in rendered.literal)
            ids, _ = self.template.encode([Rendered(rendered.text[start:], (), literal)])[0]
        except DataError as error:
            raise self._wrong(f"the chat template refuses its observation: {error.what}", error.expected) from error
        return ids.tolist()

    def _wrong(self, what: str, expected: str | None = None) -> ToolError:
        return ToolError(what, where=f"rollout.environment = {self.spec}", expected=expected)

    def _in_threads(self, work: Callable[[Talk], Any], talks: Sequence[Talk]) -> list[Any]:
        """`work` of each, in order. The threads are daemons: one that hangs must not keep the failing run from its end."""
        results: dict[int, Any] = {}
        failures: list[tuple[int, ToolError]] = []
        todo, lock = iter(range(len(talks))), threading.Lock()

        def run() -> None:
            while not failures:
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                try:
                    results[i] = work(talks[i])
                except MrlhfError as error:
                    failures.append((i, error if isinstance(error, ToolError) else self._wrong(str(error))))
                except Exception as error:  # the user's code may raise anything
                    at = traceback.extract_tb(error.__traceback__)[-1]
                    failures.append((i, self._wrong(f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})")))

        workers = [threading.Thread(target=run, daemon=True, name=f"environment-{n}") for n in range(min(self.threads, len(talks)))]
        deadline = time.monotonic() + self.timeout_s
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        if failures:
            raise min(failures, key=lambda found: found[0])[1]
        if len(results) < len(talks):
            raise self._wrong(f"{len(talks) - len(results)} of {len(talks)} conversations had no answer after {self.timeout_s:g} s")
        return [results[i] for i in range(len(talks))]

    def _on_first_rank(self, work: Callable[[Talk], Any], talks: Sequence[Talk]) -> list[Any]:
        box: list[Any] = [None, None]
        if self.group is None or dist.get_rank() == self.first_rank:
            try:
                box[0] = self._in_threads(work, talks)
            except ToolError as error:
                box[1] = error
        if self.group is not None:
            dist.broadcast_object_list(box, src=self.first_rank, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]


def make_environments(
    spec: str | None,
    tokenizer: Any,
    stop_ids: Sequence[int],
    *,
    max_turns: int,
    threads: int,
    timeout_s: float,
    tp: int,
    world: int,
    rank: int,
) -> Environments | None:
    """Of `file.py:Class`; None without. Replicas are `tp` consecutive ranks of the `world`. Collective where tp > 1."""
    if spec is None:
        return None
    wait = timedelta(seconds=timeout_s + 60)  # of the other ranks for the first one's steps
    groups = [dist.new_group(list(range(at, at + tp)), backend="gloo", timeout=wait) for at in range(0, world, tp)] if tp > 1 else []
    return Environments(
        spec,
        tokenizer,
        stop_ids=stop_ids,
        max_turns=max_turns,
        threads=threads,
        timeout_s=timeout_s,
        group=groups[rank // tp] if groups else None,
        first_rank=rank // tp * tp,
    )


def check_environment(spec: str | None, tokenizer: Any, meta: dict[str, Any]) -> list[MrlhfError]:
    """What is wrong with an environment, and the prompts it starts from (`meta`: of their data set), before anything is built."""
    if spec is None:
        return []
    found: list[MrlhfError] = []
    try:
        load_class(spec)
    except ConfigError as error:
        found.append(error)
    made_with, template = meta.get("chat_template_sha256"), tokenizer.chat_template
    if made_with is not None and (template is None or sha256(tokenizer.get_chat_template().encode()).hexdigest() != made_with):
        what = "the prompts were made with another chat template than the tokenizer's, and observations would not look like them"
        found.append(
            DataError(what, where="data.train", expected="the tokenizer's own", fix="save the template in the tokenizer's directory")
        )
    return found
