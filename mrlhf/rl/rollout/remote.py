"""Generation on ranks of its own (rollout.placement separate): the trainer's side and the other ranks'.

The generating ranks execute the commands of the trainer's rank 0 in order: generate answers, take new weights, send
answers. So a request that precedes a weight update is answered with the older weights. With rollout.max_staleness 1 the
trainer requests the next rollout as soon as it has this one, and vLLM generates it while the trainer trains.
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
from mrlhf.rl.rollout.sampler import Sampler, make_vllm_update
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling
from mrlhf.training import preflight
from mrlhf.training.phases import Phases
from mrlhf.training.stopping import Interrupted, Stopper

Key = tuple[int, int]  # step of the rollout, its first prompt


def encode_message(header: dict[str, Any], answers: Sequence[Answer] = ()) -> bytes:
    """A header (JSON) and answers, as bytes: no pickle, and every digit of the log-probs is kept."""
    rows = [(len(a.tokens), len(a.logps), a.stopped, a.observed, a.reward, a.turns) for a in answers]
    head = json.dumps({**header, "answers": rows}).encode()
    tokens = np.array([t for a in answers for t in a.tokens], "<i4")
    logps = np.array([x for a in answers for x in a.logps], "<f8")
    return len(head).to_bytes(8, "little") + head + tokens.tobytes() + logps.tobytes()


def decode_message(data: bytes) -> tuple[dict[str, Any], list[Answer]]:
    """The inverse of `encode_message`."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    rows = header.pop("answers")
    tokens = np.frombuffer(data, "<i4", sum(row[0] for row in rows), start).tolist()
    logps = np.frombuffer(data, "<f8", offset=start + 4 * len(tokens)).tolist()
    answers, t, x = [], 0, 0
    for num_tokens, num_logps, stopped, observed, reward, turns in rows:
        spans = tuple((a, b) for a, b in observed)
        answers.append(Answer(tokens[t : t + num_tokens], logps[x : x + num_logps], stopped, spans, reward, turns))
        t, x = t + num_tokens, x + num_logps
    return header, answers


def _encode_request(
    prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int, first: int
) -> str:
    """JSON of all that determines the answers besides the weights."""
    return json.dumps(
        {"prompts": prompts, "labels": list(labels), "n": n, "sampling": asdict(sampling), "step": step, "first": first}
    )


class RemoteSampler:
    """The interface of Sampler, on every rank of the trainer; all methods are collective."""

    sleeps = False

    def __init__(self, config: PPOStage, run: preflight.RunInputs, layout: state.Layout, bridge: Bridge) -> None:
        """Waits until vLLM is ready on the generating ranks."""
        self.bridge, self.max_staleness = bridge, config.rollout.max_staleness
        self.reshard = make_vllm_update(config, run, layout, bridge)
        self.weights_sent = 0
        self._metrics: dict[str, float] = {}
        # rollouts that no step has used yet: the request and the number of the weights that answer it; the answers
        # received so far
        self._requested: dict[Key, tuple[str, int]] = {}
        self._received: dict[Key, tuple[dict[str, Any], list[Answer]]] = {}
        self._sending: Sending = []
        self._generators = self._receive_from_all()

    @property
    def memory(self) -> str:
        return self._generators[0]["memory"]

    def bytes_of_ranks(self) -> list[tuple[int, int, int]]:
        own = state.from_all_ranks([(self.reshard.sent, self.reshard.received, self.reshard.copied)])
        return own + [tuple(header["bytes"]) for header in self._generators]

    def _send_command(self, command: str, **arguments: Any) -> None:
        """See `_broadcast_command`."""
        self._sending += _broadcast_command(self.bridge, command, **arguments)

    def _receive_from_all(self) -> list[dict[str, Any]]:
        box: list[Any] = [None]
        if self.bridge.rank == 0:
            box[0] = [decode_message(self.bridge.receive(rank))[0] for rank in self.bridge.generators]
            self._finish_sending()
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _finish_sending(self) -> None:
        """After a reply to the last command, when no send can block."""
        wait_for(self._sending)
        self._sending = []

    def write_weights(self, source: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Waits for generation in progress. Returns the most bytes that a rank receives, and the seconds."""
        self._send_command("weights")
        self._receive_from_all()
        seconds = self.reshard.exchange(source, {})
        self.weights_sent += 1
        return float(max(header["bytes"][1] for header in self._generators)), seconds

    def request_rollout(
        self, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int, first: int = 0
    ) -> None:
        """Requests now the answers of a later `generate` with the same arguments."""
        if (step, first) not in self._requested:
            request = _encode_request(prompts, labels, n=n, sampling=sampling, step=step, first=first)
            self._requested[step, first] = request, self.weights_sent
            self._send_command("generate", request=request)

    def generate(
        self, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int, first: int = 0
    ) -> Rollout:
        """See Sampler.generate. Raises ToolError and Interrupted when the generating ranks do."""
        self.request_rollout(prompts, labels, n=n, sampling=sampling, step=step, first=first)
        request, version = self._requested.pop((step, first))
        expected = _encode_request(prompts, labels, n=n, sampling=sampling, step=step, first=first)
        assert request == expected, f"rollout {step} was requested with other arguments"
        if (step, first) not in self._received:
            self._received[step, first] = self._receive_answers((step, first))
        header, answers = self._received.pop((step, first))
        if header["error"] is not None:
            raise ToolError(**header["error"])
        if header["interrupted"]:
            raise Interrupted
        staleness = self.weights_sent - version
        assert staleness <= self.max_staleness
        self._metrics = {"rollout/staleness": float(staleness), "timing_s/generators": header["seconds"]}
        rows = [p for p in range(len(prompts)) for _ in range(n)]
        return Rollout([prompts[p] for p in rows], answers, [labels[p] for p in rows])

    def _receive_answers(self, key: Key) -> tuple[dict[str, Any], list[Answer]]:
        """Waits for the answers to a request."""
        self._send_command("send answers", key=key)
        box = [b""]
        if self.bridge.rank == 0:
            box[0] = self.bridge.receive(self.bridge.generators[0])
            self._finish_sending()
        watch.set_phase("waiting for the answers")
        dist.broadcast_object_list(box, src=0)
        return decode_message(box[0])

    def pending_answers(self) -> bytes | None:
        """For a checkpoint, waits for requested answers that no step has used: a resumed run equals this one."""
        for key, (request, version) in self._requested.items():
            if key not in self._received:
                self._received[key] = self._receive_answers(key)
            header, answers = self._received[key]
            if answers:
                behind = self.weights_sent - version
                pending = {"key": key, "request": request, "behind": behind, "seconds": header["seconds"]}
                return encode_message(pending, answers)
        return None

    def restore_pending(
        self, data: bytes, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int
    ) -> None:
        """Takes `pending_answers` of a checkpoint, before any weight update; ignored if this run's request differs."""
        header, answers = decode_message(data)
        if header["request"] == _encode_request(prompts, labels, n=n, sampling=sampling, step=step, first=0):
            self._requested[step, 0] = header["request"], 1 - header["behind"]
            self._received[step, 0] = {"error": None, "interrupted": False, "seconds": header["seconds"]}, answers

    def generation_metrics(self) -> dict[str, float]:
        """Of the last `generate`: the updates that its weights were behind, and the seconds on the generating ranks."""
        return dict(self._metrics)

    def sleep(self) -> int:
        """Nothing: the generating ranks have memory of their own."""
        return 0

    def shutdown(self) -> None:
        stop_generators(self.bridge)
        self._finish_sending()


def _broadcast_command(bridge: Bridge, command: str, **arguments: Any) -> Sending:
    """Sends a command from the trainer's rank 0 to every generating rank, without waiting."""
    if bridge.rank != 0:
        return []
    message = encode_message({"command": command, **arguments})
    return [sending for rank in bridge.generators for sending in bridge.send(message, rank)]


def start_generators(bridge: Bridge) -> None:
    """The generating ranks start vLLM. Called on every rank of the trainer, like `stop_generators`."""
    wait_for(_broadcast_command(bridge, "start"))


def stop_generators(bridge: Bridge) -> None:
    """The generating ranks end."""
    wait_for(_broadcast_command(bridge, "stop"))


def _serve_request(sampler: Sampler, request: dict[str, Any]) -> bytes:
    """The message with the answers, or with the error."""
    start, answers = time.perf_counter(), []
    header: dict[str, Any] = {"error": None, "interrupted": False}
    sampling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["sampling"].items()}
    try:
        with heartbeat.in_phase("rollout", request["step"]):
            answers = sampler.generate(**{**request, "sampling": Sampling(**sampling)}).answers
    except ToolError as error:
        header["error"] = {name: getattr(error, name) for name in ("what", "where", "expected", "fix")}
    except Interrupted:
        header["interrupted"] = True
    return encode_message({**header, "seconds": time.perf_counter() - start}, answers)


def _serve_commands(sampler: Sampler, bridge: Bridge) -> None:
    """Executes the trainer's commands until it sends "stop"."""
    messages: dict[Key, bytes] = {}
    update = sampler.reshard
    ready = {"memory": sampler.memory, "bytes": (update.sent, update.received, update.copied)}
    wait_for(bridge.send(encode_message(ready), 0))
    while True:
        watch.set_phase("waiting for the trainer")
        header, _ = decode_message(bridge.receive(0))
        watch.set_phase(header["command"])
        if header["command"] == "stop":
            return
        if header["command"] == "weights":
            wait_for(bridge.send(encode_message({}), 0))
            sampler.write_weights({})
        elif header["command"] == "generate":
            request = json.loads(header["request"])
            messages[request["step"], request["first"]] = _serve_request(sampler, request)
        else:
            message = messages.pop(tuple(header["key"]))
            if bridge.rank == bridge.generators[0]:
                wait_for(bridge.send(message, 0))


def run_generator(config: PPOStage, run: preflight.RunInputs, bridge: Bridge, *, began: float) -> None:
    """The program of a rank that only generates. began: time.monotonic() at the process's start."""
    output_dir = Path(config.train.output_dir)
    watch.write_stacks_to(output_dir / "logs")
    heartbeat.start_beating(output_dir, rank=bridge.rank)
    stopper = Stopper(budget_minutes=None, began=began, store=bridge.store, rank=bridge.rank)
    if decode_message(bridge.receive(0))[0]["command"] == "start":
        layout = state.Layout.from_config(config.parallel, bridge.trainers)
        phase = Phases(Memory(config, spec=run.source.spec, rank=bridge.rank, world=bridge.trainers))
        with phase("build"):
            sampler = Sampler(config, run, load_tokenizer(run.source.hf_dir), layout, bridge)
        sampler.engine.should_stop = stopper.requested
        stopper.start_step()
        with phase("gen"):
            _serve_commands(sampler, bridge)
        sampler.shutdown()
    heartbeat.stop_beating()
    state.shutdown()
