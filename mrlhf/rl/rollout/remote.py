"""Generation on ranks of its own (rollout.placement separate): the trainer's end, which stands for a Sampler, and those ranks' whole life.

The generating ranks do what the trainer's rank 0 tells them, one thing after the other: answer prompts, take new weights, hand answers over.
So whatever is asked for before weights are sent is answered with the older ones: with rollout.max_staleness 1 the next rollout is asked
for as soon as this one is there, and generated while the trainer trains on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mrlhf.config.options import PPOStage
from mrlhf.data.tokenizers.hf import load_tokenizer
from mrlhf.errors import ToolError
from mrlhf.memory.tracker import Memory
from mrlhf.observe import heartbeat
from mrlhf.parallel import state, watch
from mrlhf.parallel.split import Bridge, Sending, wait_for
from mrlhf.rl.rollout.sampler import Sampler, plan_of
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling
from mrlhf.training import preflight
from mrlhf.training.stopping import Interrupted, Stopper

Key = tuple[int, int]  # step of the rollout, its first prompt


def encode(header: dict[str, Any], answers: Sequence[Answer] = ()) -> bytes:
    """A message: no pickle, and numbers in every digit."""
    rows = [(len(a.tokens), len(a.logps), a.stopped, a.observed, a.reward, a.turns) for a in answers]
    head = json.dumps({**header, "answers": rows}).encode()
    tokens = np.array([t for a in answers for t in a.tokens], "<i4")
    logps = np.array([x for a in answers for x in a.logps], "<f8")
    return len(head).to_bytes(8, "little") + head + tokens.tobytes() + logps.tobytes()


def decode(data: bytes) -> tuple[dict[str, Any], list[Answer]]:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    rows = header.pop("answers")
    tokens = np.frombuffer(data, "<i4", sum(row[0] for row in rows), start)
    logps = np.frombuffer(data, "<f8", offset=start + tokens.nbytes)
    answers, t, x = [], 0, 0
    for num_tokens, num_logps, stopped, observed, reward, turns in rows:
        spans = tuple((a, b) for a, b in observed)
        answers.append(Answer(tokens[t : t + num_tokens].tolist(), logps[x : x + num_logps].tolist(), stopped, spans, reward, turns))
        t, x = t + num_tokens, x + num_logps
    return header, answers


def _request(prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int, first: int) -> str:
    """JSON: what an answer depends on besides the weights."""
    return json.dumps({"prompts": prompts, "labels": list(labels), "n": n, "sampling": asdict(sampling), "step": step, "first": first})


class RemoteSampler:
    """On every rank of the trainer; all call its methods alike."""

    sleeps = False

    def __init__(self, config: PPOStage, run: preflight.Run, layout: state.Layout, bridge: Bridge) -> None:
        """Waits until vLLM stands on the other ranks. Collective, as everything here."""
        self.bridge, self.max_staleness = bridge, config.rollout.max_staleness
        self.reshard = plan_of(config, run, layout, bridge)
        self.weights_sent = 0
        self._facts: dict[str, float] = {}
        self._asked: dict[Key, tuple[str, int]] = {}  # what is not used yet: the request, and the weights that it meets there
        self._here: dict[Key, tuple[dict[str, Any], list[Answer]]] = {}  # that which has come already
        self._sending: Sending = []
        self._hello = self._hear_from_all()

    @property
    def memory(self) -> str:
        return self._hello[0]["memory"]

    def bytes_of_ranks(self) -> list[tuple[int, int, int]]:
        ours = state.from_all_ranks([(self.reshard.sent, self.reshard.received, self.reshard.copied)])
        return ours + [tuple(header["bytes"]) for header in self._hello]

    def _tell(self, what: str, **more: Any) -> None:
        if self.bridge.rank == 0:
            for rank in self.bridge.generators:
                self._sending += self.bridge.send(encode({"what": what, **more}), rank)

    def _hear_from_all(self) -> list[dict[str, Any]]:
        box: list[Any] = [None]
        if self.bridge.rank == 0:
            box[0] = [decode(self.bridge.receive(rank))[0] for rank in self.bridge.generators]
            self._all_sent()
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _all_sent(self) -> None:
        """After an answer to the last thing told: these do not wait."""
        wait_for(self._sending)
        self._sending = []

    def write_weights(self, source: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Waits for what is being generated. Returns the bytes that one rank receives at most, and the seconds of the exchange."""
        self._tell("weights")
        self._hear_from_all()
        seconds = self.reshard.exchange(source, {})
        self.weights_sent += 1
        return float(max(header["bytes"][1] for header in self._hello)), seconds

    def ask(self, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int, first: int = 0) -> None:
        """Ask now for what `generate` will be called with."""
        if (step, first) not in self._asked:
            request = _request(prompts, labels, n=n, sampling=sampling, step=step, first=first)
            self._asked[step, first] = request, self.weights_sent
            self._tell("generate", request=request)

    def generate(
        self, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int, first: int = 0
    ) -> Rollout:
        """As Sampler.generate. Raises ToolError and Interrupted as the generating ranks do."""
        self.ask(prompts, labels, n=n, sampling=sampling, step=step, first=first)
        asked, version = self._asked.pop((step, first))
        assert asked == _request(prompts, labels, n=n, sampling=sampling, step=step, first=first), f"rollout {step} was asked for otherwise"
        header, answers = self._here.pop((step, first)) if (step, first) in self._here else self._take((step, first))
        if header["error"] is not None:
            raise ToolError(**header["error"])
        if header["interrupted"]:
            raise Interrupted
        staleness = self.weights_sent - version
        assert staleness <= self.max_staleness
        self._facts = {"rollout/staleness": float(staleness), "timing_s/generators": header["seconds"]}
        rows = [p for p in range(len(prompts)) for _ in range(n)]
        return Rollout([prompts[p] for p in rows], answers, [labels[p] for p in rows])

    def _take(self, key: Key) -> tuple[dict[str, Any], list[Answer]]:
        """Waits for what was asked for."""
        self._tell("hand over", key=key)
        box = [b""]
        if self.bridge.rank == 0:
            box[0] = self.bridge.receive(self.bridge.generators[0])
            self._all_sent()
        watch.phase("waiting for the answers")
        dist.broadcast_object_list(box, src=0)
        return decode(box[0])

    def ahead(self) -> bytes | None:
        """For a checkpoint, so that the run that goes on with it is this one: answers that were asked for and not used yet. Waits for them."""
        for key, (request, version) in self._asked.items():
            if key not in self._here:
                self._here[key] = self._take(key)
            header, answers = self._here[key]
            if answers:
                return encode(
                    {"key": key, "request": request, "behind": self.weights_sent - version, "seconds": header["seconds"]}, answers
                )
        return None

    def take_up(self, data: bytes, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int) -> None:
        """What `ahead` gave, before any weights are sent; of no use where the run goes on with another request."""
        header, answers = decode(data)
        if header["request"] == _request(prompts, labels, n=n, sampling=sampling, step=step, first=0):
            self._asked[step, 0] = header["request"], 1 - header["behind"]
            self._here[step, 0] = {"error": None, "interrupted": False, "seconds": header["seconds"]}, answers

    def facts(self) -> dict[str, float]:
        """Of the last `generate`: how many updates its weights were behind, and the seconds it took there."""
        return dict(self._facts)

    def sleep(self) -> None:
        """The others have their own memory."""

    def shutdown(self) -> None:
        dismiss(self.bridge)
        self._all_sent()


def _say(bridge: Bridge, what: str) -> None:
    if bridge.rank == 0:
        for rank in bridge.generators:
            wait_for(bridge.send(encode({"what": what}), rank))


def begin(bridge: Bridge) -> None:
    """There is something to train: vLLM is to be started. On every rank of the trainer, like `dismiss`."""
    _say(bridge, "begin")


def dismiss(bridge: Bridge) -> None:
    """The end of the generating ranks."""
    _say(bridge, "stop")


def _answer(sampler: Sampler, request: dict[str, Any]) -> bytes:
    """To one request, or why there is none."""
    start, answers = time.perf_counter(), []
    outcome: dict[str, Any] = {"error": None, "interrupted": False}
    sampling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["sampling"].items()}
    try:
        with heartbeat.phase("rollout", request["step"]):
            answers = sampler.generate(**{**request, "sampling": Sampling(**sampling)}).answers
    except ToolError as error:
        outcome["error"] = {name: getattr(error, name) for name in ("what", "where", "expected", "fix")}
    except Interrupted:
        outcome["interrupted"] = True
    return encode({**outcome, "seconds": time.perf_counter() - start}, answers)


def serve(sampler: Sampler, bridge: Bridge) -> None:
    """Until the trainer says stop."""
    ready: dict[Key, bytes] = {}
    plan = sampler.reshard
    wait_for(bridge.send(encode({"memory": sampler.memory, "bytes": (plan.sent, plan.received, plan.copied)}), 0))
    while True:
        watch.phase("waiting for the trainer")
        told, _ = decode(bridge.receive(0))
        watch.phase(told["what"])
        if told["what"] == "stop":
            return
        if told["what"] == "weights":
            wait_for(bridge.send(encode({}), 0))
            sampler.write_weights({})
        elif told["what"] == "generate":
            request = json.loads(told["request"])
            ready[request["step"], request["first"]] = _answer(sampler, request)
        else:
            found = ready.pop(tuple(told["key"]))
            if bridge.rank == bridge.generators[0]:
                wait_for(bridge.send(found, 0))


def run_generator(config: PPOStage, run: preflight.Run, bridge: Bridge, *, began: float) -> None:
    """What a rank does that only generates, from the trainer's first word to its last."""
    output_dir = Path(config.train.output_dir)
    watch.log_to(output_dir / "logs")
    heartbeat.start(output_dir, rank=bridge.rank)
    stopper = Stopper(budget_minutes=None, began=began, store=bridge.store, rank=bridge.rank)
    if decode(bridge.receive(0))[0]["what"] == "begin":
        layout = state.Layout.of(config.parallel, bridge.trainers)
        memory = Memory(config, spec=run.source.spec, rank=bridge.rank, world=bridge.trainers)
        with memory("build"):
            sampler = Sampler(config, run, load_tokenizer(run.source.hf_dir), layout, bridge)
        sampler.engine.should_stop = stopper.requested
        with memory("gen"):
            serve(sampler, bridge)
        sampler.shutdown()
    heartbeat.stop()
    state.shutdown()
