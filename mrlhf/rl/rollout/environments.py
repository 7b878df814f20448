"""Conversations between the model and an environment (tools, games, users): `rollout.environment: file.py:Class`.

    class Class:
        def reset(self, record): ...             # {"prompt": text, "label": the prompt's label}
        def step(self, messages, text): ...      # -> (observation, reward, done)

Every conversation has its own object. `text` is the model's turn; `messages` is the conversation up to and including
it: the prompt as one message with the role "prompt", then assistant messages and observations. An observation is a
message, a list of messages (rendered by the chat template, followed by its generation prompt), or a string, which
continues the model's turn after a stop string. All conversations advance together: one call of vLLM for those that are
not done, then their environments in threads. Token ids are kept; only new text is tokenized.
"""

from __future__ import annotations

import inspect
import math
import numbers
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch.distributed as dist

from mrlhf.config.user_file import exception_text, load_module, user_code
from mrlhf.data.prepare.template import Template
from mrlhf.data.tokenizers.special import Rendered
from mrlhf.errors import ConfigError, DataError, MrlhfError, ToolError
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling, VLLMEngine

Message = dict[str, Any]
SeedFn = Callable[[int, int], int]  # (conversation, turn) -> seed
_TEMPLATE_PROBE = [{"role": "user", "content": "a0b1"}, {"role": "assistant", "content": "c2d3"}]


def load_environment_class(spec: str) -> type:
    """The class of `file.py:Class`. Raises ConfigError unless it exists with reset(record) and step(messages, text)."""
    key = "rollout.environment"
    path, colon, name = spec.rpartition(":")
    if not (colon and path.endswith(".py") and name.isidentifier()):
        raise ConfigError(f"{key} = {spec!r}", where=key, expected="path/file.py:Class")
    module = load_module(path, what="environment file")
    cls = getattr(module, name, None)
    if not inspect.isclass(cls):
        own = [k for k, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
        expected = ", ".join(own) or "a file that defines a class"
        raise ConfigError(f"{path} has no class {name!r}", where=key, expected=expected)
    for method, arguments in (("reset", (None, {})), ("step", (None, [], ""))):
        try:
            inspect.signature(getattr(cls, method)).bind(*arguments)
        except (AttributeError, TypeError) as error:
            expected = "reset(self, record) and step(self, messages, text)"
            raise ConfigError(f"{spec}: {error}", where=key, expected=expected) from error
    return cls


@dataclass(frozen=True)
class StepResult:
    """The result of one environment step. ids: the tokens of the observation. done: the conversation is over."""

    observation: list[Message] | str
    ids: list[int]
    reward: float
    done: bool


@dataclass
class Conversation:
    """The state of one conversation; `tokens`, `logps`, `observed` as in Answer."""

    environment: Any
    label: Any
    prompt: list[int]
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    observed: list[tuple[int, int]] = field(default_factory=list)
    reward: float = 0.0
    turns: int = 0
    done: bool = False

    def add_turn(self, answer: Answer, text: str) -> None:
        self.tokens += answer.tokens
        self.logps += answer.logps
        self.turns += 1
        self.messages.append({"role": "assistant", "content": text})

    def add_observation(self, result: StepResult) -> None:
        self.observed.append((len(self.tokens), len(self.tokens) + len(result.ids)))
        self.tokens += result.ids
        seen = result.observation
        self.messages += [{"role": "observation", "content": seen}] if isinstance(seen, str) else seen

    def as_answer(self) -> Answer:
        return Answer(self.tokens, self.logps, self.done, tuple(self.observed), self.reward, self.turns)


class Environments:
    """The environments of one vLLM replica. They run on its first rank; `group` broadcasts the results.

    stop_ids: the tokens that close the model's turn; other stop tokens and strings only interrupt it. max_turns: of the
    model in a conversation. threads: environment steps at once. timeout_s: for the steps of one turn of all
    conversations.
    """

    def __init__(self, spec: str, tokenizer: Any, *, stop_ids: Sequence[int], max_turns: int, threads: int,
                 timeout_s: float, group: dist.ProcessGroup | None = None, first_rank: int = 0) -> None:
        self.spec, self.cls, self.tokenizer = spec, load_environment_class(spec), tokenizer
        self.stop_ids, self.max_turns, self.threads, self.timeout_s = frozenset(stop_ids), max_turns, threads, timeout_s
        self.group, self.first_rank = group, first_rank
        self.template = Template(tokenizer) if tokenizer.chat_template else None

    def run_conversations(self, engine: VLLMEngine, prompts: Sequence[list[int]], labels: Sequence[Any], seed: SeedFn,
                          sampling: Sampling) -> list[Answer]:
        """One conversation per prompt; seed(i, turn) is the seed of a turn of the i-th.

        A conversation has at most `max_turns` turns and sampling.max_new_tokens tokens, observations included. A turn
        that the token limit cuts ends it and is not shown to the environment. Collective in a replica. Raises ToolError
        on all its ranks.
        """
        conversations = [
            Conversation(None, label, prompt, [{"role": "prompt", "content": self.tokenizer.decode(prompt)}])
            for prompt, label in zip(prompts, labels, strict=True)
        ]
        self._on_first_rank(self._reset, conversations)
        active = list(enumerate(conversations))
        for turn in range(self.max_turns):
            if not active:
                break
            limits = [sampling.max_new_tokens - len(c.tokens) for _, c in active]
            contexts, seeds = [c.prompt + c.tokens for _, c in active], [seed(i, turn) for i, _ in active]
            answers = engine.generate(contexts, seeds, sampling, limits)
            for (_, c), answer in zip(active, answers, strict=True):
                c.add_turn(answer, self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            complete = [pair for pair, answer in zip(active, answers, strict=True) if answer.stopped]
            results = self._on_first_rank(self._step, [c for _, c in complete])
            active = []
            for (i, c), result in zip(complete, results, strict=True):
                c.reward += result.reward
                c.done = result.done
                has_room = len(c.tokens) + len(result.ids) < sampling.max_new_tokens
                if not result.done and turn + 1 < self.max_turns and has_room:
                    c.add_observation(result)
                    active.append((i, c))
        return [c.as_answer() for c in conversations]

    # ------------------------------------------------------------------ the user's code

    def _reset(self, conversation: Conversation) -> None:
        conversation.environment = self.cls()
        conversation.environment.reset({"prompt": conversation.messages[0]["content"], "label": conversation.label})

    def _step(self, conversation: Conversation) -> StepResult:
        messages = conversation.messages
        returned = conversation.environment.step(list(messages), messages[-1]["content"])
        if not isinstance(returned, tuple) or len(returned) != 3:
            raise self._error(f"step returned {returned!r}"[:300], "(observation, reward, done)")
        observation, reward, done = returned
        if isinstance(reward, bool) or not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise self._error(f"step returned the reward {reward!r}", "a finite number")
        if not isinstance(done, bool):
            raise self._error(f"step returned done = {done!r}", "True or False")
        if done:
            return StepResult([], [], float(reward), True)
        observation = [observation] if isinstance(observation, dict) else observation
        encode: Any = self._encode_text if isinstance(observation, str) else self._encode_messages
        ids = encode(observation, conversation.tokens[-1] in self.stop_ids)
        return StepResult(observation, ids, float(reward), False)

    def _encode_text(self, text: str, turn_is_closed: bool) -> list[int]:
        """The ids of a text that continues the model's turn."""
        if turn_is_closed or not text:
            what = f"the observation {text[:100]!r} is a string, and the model's turn is over"
            what = what if turn_is_closed else "an empty observation"
            raise self._error(what, "a message, or a text that goes on after a stop string (rollout.stop)")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_messages(self, observation: Any, turn_is_closed: bool) -> list[int]:
        """The ids between the model's turn and its next one, as the chat template renders them."""
        messages = observation if isinstance(observation, list) else []
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            what = f"step returned the observation {observation!r}"[:300]
            raise self._error(what, "a message {role, content}, a list of them, or a string")
        if self.template is None:
            what = "the tokenizer has no chat template for messages"
            raise self._error(what, "a chat template, or observations that are strings")
        try:
            rendered = self.template.prompt([*_TEMPLATE_PROBE, *messages])
            start = rendered.text.index("c2d3") + 4
            end = self.template.end_token or ""
            if turn_is_closed and end and rendered.text.startswith(end, start):
                start += len(end)
            literal = tuple((a - start, b - start) for a, b in rendered.literal)
            ids, _ = self.template.encode([Rendered(rendered.text[start:], (), literal)])[0]
        except DataError as error:
            raise self._error(f"the chat template refuses its observation: {error.what}", error.expected) from error
        return ids.tolist()

    def _error(self, what: str, expected: str | None = None) -> ToolError:
        return ToolError(what, where=f"rollout.environment = {self.spec}", expected=expected)

    def _run_in_threads(self, work: Callable[[Conversation], Any], conversations: Sequence[Conversation]) -> list[Any]:
        """work(conversation) of each, in order. Daemon threads: one that hangs must not keep a failing run alive."""
        results: dict[int, Any] = {}
        errors: list[tuple[int, ToolError]] = []
        queue, lock = iter(range(len(conversations))), threading.Lock()

        def run_worker() -> None:
            while not errors:
                with lock:
                    i = next(queue, None)
                if i is None:
                    return
                try:
                    with user_code():
                        results[i] = work(conversations[i])
                except MrlhfError as error:
                    errors.append((i, error if isinstance(error, ToolError) else self._error(str(error))))
                except BaseException as error:  # the user's code may raise anything
                    errors.append((i, self._error(exception_text(error))))

        count, total = min(self.threads, len(conversations)), len(conversations)
        workers = [threading.Thread(target=run_worker, daemon=True, name=f"environment-{n}") for n in range(count)]
        deadline = time.monotonic() + self.timeout_s
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        if errors:
            raise min(errors, key=lambda entry: entry[0])[1]
        if len(results) < total:
            missing = total - len(results)
            raise self._error(f"{missing} of {total} conversations had no answer after {self.timeout_s:g} s")
        return [results[i] for i in range(total)]

    def _on_first_rank(self, work: Callable[[Conversation], Any], conversations: Sequence[Conversation]) -> list[Any]:
        """The results of `work`, which the replica's first rank does, on all its ranks. Raises its ToolError on all."""
        box: list[Any] = [None, None]
        if self.group is None or dist.get_rank() == self.first_rank:
            try:
                box[0] = self._run_in_threads(work, conversations)
            except ToolError as error:
                box[1] = error
        if self.group is not None:
            dist.broadcast_object_list(box, src=self.first_rank, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]


def make_environments(spec: str | None, tokenizer: Any, stop_ids: Sequence[int], *, max_turns: int, threads: int,
                      timeout_s: float, tp: int, world: int, rank: int) -> Environments | None:
    """The environments of this rank's vLLM replica (`tp` consecutive ranks); None without a spec. Collective."""
    if spec is None:
        return None
    group = None
    if tp > 1:
        patience = timedelta(seconds=timeout_s + 60)  # the other ranks wait for the steps on the first one
        firsts = range(0, world, tp)
        groups = [dist.new_group(list(range(r, r + tp)), backend="gloo", timeout=patience) for r in firsts]
        group = groups[rank // tp]
    return Environments(spec, tokenizer, stop_ids=stop_ids, max_turns=max_turns, threads=threads, timeout_s=timeout_s,
                        group=group, first_rank=rank // tp * tp)


def check_environment(spec: str | None, tokenizer: Any, meta: dict[str, Any]) -> list[MrlhfError]:
    """Errors of an environment and of its prompts, before anything is built. meta: of the prompts' data set."""
    if spec is None:
        return []
    errors: list[MrlhfError] = []
    try:
        load_environment_class(spec)
    except ConfigError as error:
        errors.append(error)
    made_with, template = meta.get("chat_template_sha256"), tokenizer.chat_template

    def is_own() -> bool:
        return template is not None and sha256(tokenizer.get_chat_template().encode()).hexdigest() == made_with

    if made_with is not None and not is_own():
        what = "the prompts were made with another chat template than the tokenizer's, which renders the observations"
        fix = "save the template in the tokenizer's directory"
        errors.append(DataError(what, where="data.train", expected="the tokenizer's own", fix=fix))
    return errors
