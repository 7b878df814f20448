"""`mrlhf serve-reward`: a reward model behind HTTP, with the protocol of `reward.sources: http://...`, docs/rewards.md.

Rank 0 listens. Requests that arrive while the model works wait, and then go through the model together. Under torchrun
the ranks share the model: rank 0 broadcasts each batch to the others.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split

from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import ServeRewardStage
from mrlhf.data.loader import Sample, collate
from mrlhf.data.tokenizers.hf import fingerprint, load_tokenizer
from mrlhf.errors import CheckpointError, ConfigError, Problems
from mrlhf.models.families.spec import check_layout
from mrlhf.parallel import device, state
from mrlhf.rl.rewards.server import RewardServer, is_loopback
from mrlhf.training.batches import make_batch_plan
from mrlhf.training.trainer import Model, place_samples, score_micro_batches

Sequences = list[list[int]]
_IDLE_S = 60.0  # without work, rank 0 broadcasts an empty batch after this time: else the collective would time out
_STOP: Sequences | None = None
log = logging.getLogger(__name__)


def check_server(config: ServeRewardStage, world: int) -> tuple[ModelSource, str | None]:
    """The model and the token. Raises every problem, together."""
    problems, source = Problems(), None
    try:
        source = open_source(config.checkpoint)
        if source.head != "value":
            what = "it holds a language model, which gives no score"
            problems.add(CheckpointError(what, where=str(source.path), expected="a reward model (mrlhf rm)"))
        problems.extend(check_layout(config.parallel, source.spec, world, trained=False))
    except CheckpointError as error:
        problems.add(error)
    token = os.environ.get(config.token_env) if config.token_env else None
    if config.token_env and not token:
        what = f"environment variable {config.token_env} with the token is not set"
        problems.add(ConfigError(what, where="token_env", fix=f"export {config.token_env}=..."))
    if not token and not is_loopback(config.host):
        what = f"other machines can reach host = {config.host}, and there is no token"
        expected, fix = "a token, or a loopback address", "export REWARD_TOKEN=...; --token_env REWARD_TOKEN"
        problems.add(ConfigError(what, where="host", expected=expected, fix=fix))
    problems.raise_if_any()
    assert source is not None
    return source, token


@dataclass
class Job:
    """The sequences of one request and their scores in the future."""

    sequences: Sequences
    scores: Future[list[float]] = field(default_factory=Future)


class Scorer:
    """The model on all ranks. Rank 0 calls `submit`, `serve_requests` and `stop`, the others `follow`."""

    def __init__(self, config: ServeRewardStage, source: ModelSource, layout: state.Layout) -> None:
        self.config, self.layout = config, layout
        self.model = Model(source, config.parallel, head="value", dtype=config.dtype or source.dtype, seed=1)
        self.statistics = source.manifest if config.normalize else {}
        # A SimpleQueue, because a signal handler may call `put`. None: stop.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: Job | None = None  # taken from the queue, but too large for the last batch
        self._stopping = False  # `stop` came while requests waited before it
        self._idle_s = min(_IDLE_S, config.parallel.timeout_minutes * 60 / 4)

    def score_sequences(self, sequences: Sequences) -> list[float]:
        """The head's value at the last token of each sequence, normalised if the checkpoint has statistics.

        Collective; returns all scores on every rank.
        """
        rows = min(self.config.micro_batch_size, len(sequences))
        plan = make_batch_plan(self.model.groups, packing=self.config.packing, micro_batch_size=rows)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # similar lengths need little padding
        samples = [Sample(np.array(sequences[i], np.int64), np.zeros(len(sequences[i]), np.uint8), i) for i in order]
        samples.append(replace(samples[-1], weight=0.0))  # -1, the filler
        parts = plan.split(plan.with_fillers(range(len(order))), lambda at: [len(samples[at].tokens)])
        batches = [collate([samples[at] for at in part], packing=plan.packing, pad_multiple=plan.pad_multiple)
                   for part in parts]
        scores_N = torch.zeros(len(sequences), dtype=torch.float64)
        place_samples(scores_N, batches, score_micro_batches(self.model, batches))
        scores_N = state.sum_over_data_parallel(scores_N)
        if "reward_mean" in self.statistics:
            scores_N = (scores_N - self.statistics["reward_mean"]) / self.statistics["reward_std"]
        return scores_N.float().tolist()

    def submit(self, sequences: Sequences) -> Future[list[float]]:
        """The scores of one request. A caller that waits no longer cancels them. Any thread may call it."""
        job = Job(sequences)
        self._jobs.put(job)
        return job.scores

    def stop(self) -> None:
        """Ends `serve_requests` after the batch in work; a signal handler may call it."""
        self._jobs.put(None)

    def serve_requests(self) -> None:
        """Rank 0: scores the requests that wait, in batches of at most `max_batch_size` sequences, until `stop`."""
        while (batch := self._next_batch()) is not None:
            jobs = [job for job in batch if job.scores.set_running_or_notify_cancel()]
            sequences = [sequence for job in jobs for sequence in job.sequences]
            self._broadcast(sequences)
            scores = self.score_sequences(sequences) if sequences else []
            for job in jobs:
                job.scores.set_result(scores[: len(job.sequences)])
                scores = scores[len(job.sequences) :]
        self._broadcast(_STOP)
        while not self._jobs.empty():
            if (waiting := self._jobs.get()) and waiting.scores.set_running_or_notify_cancel():
                waiting.scores.set_exception(TimeoutError())

    def _next_batch(self) -> list[Job] | None:
        """Requests for one batch; an empty list after _IDLE_S without a request; None after `stop`."""
        if self._stopping:
            return None
        try:
            job = self._waiting or self._jobs.get(timeout=self._idle_s)
        except queue.Empty:
            return []
        jobs: list[Job] = []
        self._waiting = None
        while job is not None:
            size = sum(len(j.sequences) for j in (*jobs, job))
            if jobs and size > self.config.max_batch_size:
                self._waiting = job
                return jobs
            jobs.append(job)
            if self._jobs.empty():
                return jobs
            job = self._jobs.get()
        self._stopping = True
        return jobs or None

    def follow(self) -> None:
        """Ranks but 0: score the batches that rank 0 broadcasts, until it stops."""
        box: list[Any] = [None]
        while True:
            dist.broadcast_object_list(box, src=0)
            if box[0] is _STOP:
                return
            if box[0]:
                self.score_sequences(box[0])

    def _broadcast(self, sequences: Sequences | None) -> None:
        if self.layout.world > 1:
            dist.broadcast_object_list([sequences], src=0)


def main(config: ServeRewardStage) -> None:
    source, token = check_server(config, state.world_size())
    layout = state.initialize(config.parallel, seed=1)
    scorer = Scorer(config, source, layout)
    if not state.is_main():
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 stops the others
            signal.signal(number, signal.SIG_IGN)
        scorer.follow()
        return state.shutdown()
    if config.normalize and "reward_mean" not in source.manifest:
        log.info(f"{source.path} has no score statistics: its scores are not normalised")
    server = RewardServer((config.host, config.port), submit=scorer.submit, timeout_s=config.timeout_s,
                          tokenizer=load_tokenizer(source.hf_dir), fingerprint=fingerprint(source.hf_dir),
                          vocab_size=source.spec.vocab_size, max_length=source.spec.max_position_embeddings,
                          max_request_bytes=config.max_request_mib << 20, max_batch_size=config.max_batch_size,
                          token=token)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: scorer.stop())
    server.start()
    log.info(f"device: {device.current().summary()}; {scorer.model.dtype}")
    log.info(f"serving {source.path} at {server.url}{'' if token is None else ', token needed'}")
    scorer.serve_requests()
    server.stop()
    state.shutdown()
