"""`mrlhf serve-reward`: a reward model behind HTTP, with the protocol that `reward.sources: http://...` speaks (docs/rewards.md).

Rank 0 listens; requests that come while the model works wait and then go through it together. Under torchrun the ranks share the model:
rank 0 sends each batch to the others.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split

from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import ServeRewardStage
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.data.tokenizers.hf import fingerprint, load_tokenizer
from mrlhf.errors import CheckpointError, ConfigError, Problems
from mrlhf.models.families.spec import check_layout
from mrlhf.parallel import device, state
from mrlhf.rl.rewards.server import RewardServer, is_loopback
from mrlhf.training.scoring import score_micro_batches
from mrlhf.training.trainer import Model

Sequences = list[list[int]]
_IDLE_S = 60.0  # ranks that wait for work hear from rank 0 at least so often: else their collective would time out
_STOP: Sequences | None = None


def check(config: ServeRewardStage, world: int) -> tuple[ModelSource, str | None]:
    """The model and the token. Raises every problem found, together."""
    problems, source = Problems(), None
    try:
        source = open_source(config.checkpoint)
        if source.head != "value":
            problems.add(
                CheckpointError(
                    "it holds a language model, which gives no score", where=str(source.path), expected="a reward model (mrlhf rm)"
                )
            )
        problems.extend(check_layout(config.parallel, source.spec, world, trained=False))
    except CheckpointError as error:
        problems.add(error)
    token = os.environ.get(config.token_env) if config.token_env else None
    if config.token_env and not token:
        problems.add(
            ConfigError(
                f"environment variable {config.token_env} with the token is not set",
                where="token_env",
                fix=f"export {config.token_env}=...",
            )
        )
    if not token and not is_loopback(config.host):
        problems.add(
            ConfigError(
                f"host = {config.host} can be reached from other machines, and there is no token", where="host",
                expected="a token for everything but this machine itself", fix="export REWARD_TOKEN=...; --token_env REWARD_TOKEN",
            )
        )  # fmt: skip
    problems.raise_if_any()
    assert source is not None
    return source, token


@dataclass
class Job:
    """Sequences of one request, and their scores once there are some."""

    sequences: Sequences
    done: threading.Event = field(default_factory=threading.Event)
    scores: list[float] | None = None


class Scorer:
    """The model of all ranks. `score` is collective; `submit` and `run` are rank 0's."""

    def __init__(self, config: ServeRewardStage, source: ModelSource, layout: state.Layout) -> None:
        self.config, self.layout = config, layout
        self.model = Model(source, config.parallel, head="value", dtype=config.dtype, seed=1)
        self.statistics = source.manifest if config.normalize else {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # whose put may come from a signal handler
        self._idle_s = min(_IDLE_S, config.parallel.timeout_minutes * 60 / 4)

    def score(self, sequences: Sequences) -> list[float]:
        """The head's value at the last token of each, normalised where the checkpoint has statistics. Collective; all ranks get all scores."""
        rows = min(self.config.micro_batch_size, len(sequences))
        unit, (_, dp, _) = rows * self.layout.dp, self.layout.coordinates(dist.get_rank())
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # rows of about one length need little padding
        order += order[-1:] * (-len(order) % (unit * state.slice_multiple(self.config.parallel)))
        batches = [self._batch(sequences, order[at : at + rows]) for at in range(dp * rows, len(order), unit)]
        scores_N = torch.zeros(len(sequences), dtype=torch.float64)
        counts_N = torch.zeros(len(sequences), dtype=torch.float64)
        for batch, found_N in zip(batches, score_micro_batches(self.model, batches), strict=True):
            scores_N.index_add_(0, batch.index_N, found_N.double())
            counts_N.index_add_(0, batch.index_N, torch.ones_like(found_N, dtype=torch.float64))
        scores_N = state.sum_over_data_parallel(scores_N) / state.sum_over_data_parallel(counts_N)
        if "reward_mean" in self.statistics:
            scores_N = (scores_N - self.statistics["reward_mean"]) / self.statistics["reward_std"]
        return scores_N.float().tolist()

    def _batch(self, sequences: Sequences, rows: list[int]) -> MicroBatch:
        samples = [Sample(np.array(sequences[i], np.int64), np.zeros(len(sequences[i]), np.uint8), i) for i in rows]
        return collate(samples, packing=self.config.packing, pad_multiple=state.pad_multiple(self.config.parallel))

    def submit(self, sequences: Sequences, *, timeout_s: float) -> list[float]:
        """From a request's thread. Raises TimeoutError when the model has not come to it in time."""
        job = Job(sequences)
        self._jobs.put(job)
        if not job.done.wait(timeout_s) or job.scores is None:
            raise TimeoutError
        return job.scores

    def stop(self) -> None:
        self._jobs.put(None)

    def run(self) -> None:
        """Rank 0: what has come together goes through the model together, `max_batch_size` sequences at most, until `stop`."""
        waiting: Job | None = None
        while True:
            try:
                first = waiting or self._jobs.get(timeout=self._idle_s)
            except queue.Empty:
                self._tell([])
                continue
            if first is None:
                self._tell(_STOP)
                return
            jobs, waiting = [first], None
            while not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    self.stop()
                    break
                if sum(len(j.sequences) for j in (*jobs, following)) > self.config.max_batch_size:
                    waiting = following
                    break
                jobs.append(following)
            together = [s for job in jobs for s in job.sequences]
            self._tell(together)
            scores = self.score(together)
            for job in jobs:
                job.scores, scores = scores[: len(job.sequences)], scores[len(job.sequences) :]
                job.done.set()

    def follow(self) -> None:
        """The other ranks: score what rank 0 sends, until it stops."""
        box: list[Any] = [None]
        while True:
            dist.broadcast_object_list(box, src=0)
            if box[0] is _STOP:
                return
            if box[0]:
                self.score(box[0])

    def _tell(self, sequences: Sequences | None) -> None:
        if self.layout.world > 1:
            dist.broadcast_object_list([sequences], src=0)


def main(config: ServeRewardStage) -> None:
    source, token = check(config, state.world_size())
    layout = state.initialize(config.parallel, seed=1)
    scorer = Scorer(config, source, layout)
    if not state.is_main():
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 says when to stop
            signal.signal(number, signal.SIG_IGN)
        scorer.follow()
        return state.shutdown()
    if config.normalize and "reward_mean" not in source.manifest:
        print(f"{source.path} has no score statistics: its scores are not normalised", flush=True)
    server = RewardServer(
        (config.host, config.port),
        score=lambda sequences: scorer.submit(sequences, timeout_s=config.timeout_s),
        tokenizer=load_tokenizer(source.hf_dir),
        fingerprint=fingerprint(source.hf_dir),
        vocab_size=source.spec.vocab_size,
        max_length=source.spec.max_position_embeddings,
        max_request_bytes=config.max_request_mib << 20,
        max_batch_size=config.max_batch_size,
        token=token,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: scorer.stop())
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    print(f"device: {device.current().describe()}", flush=True)
    print(f"serving {source.path} at {server.url}{'' if token is None else ', token needed'}", flush=True)
    scorer.run()
    server.shutdown()
    server.server_close()
    state.shutdown()
