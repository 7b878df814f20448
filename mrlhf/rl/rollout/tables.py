"""A rollout: prompts -> answers from every vLLM replica, and the per-token tables that PPO computes on.

Legend: B answers of the rollout (all ranks), A tokens of the longest answer, T tokens of a micro-batch row,
N samples of a micro-batch. Answer b belongs to prompt b // n. Every rank holds the whole rollout's tables
[B, A] (a few floats a token); a data-parallel rank computes the rows of its share and they are summed up.
A token of an answer is one that the model wrote: what an environment put between its turns is read by the
models, and stands in no table, no loss, no KL and no advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from mrlhf.data.batching import BatchPlan, largest_differencing
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.errors import ToolError
from mrlhf.parallel import state, watch
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling, VLLMEngine
from mrlhf.training.stopping import Interrupted

if TYPE_CHECKING:
    from mrlhf.rl.rollout.environments import Environments
    from mrlhf.training.trainer import Model


@dataclass(frozen=True)
class Rollout:
    """`prompts[b]`, `answers[b]`, `labels[b]` of every answer; `mask_BA` 1 on its tokens."""

    prompts: list[list[int]]
    answers: list[Answer]
    labels: list[Any]

    @property
    def size(self) -> int:
        return len(self.answers)

    def lengths_B(self) -> torch.Tensor:
        return torch.tensor([len(a.logps) for a in self.answers])

    def mask_BA(self) -> torch.Tensor:
        lengths_B = self.lengths_B()
        return (torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]).float()

    def rollout_logps_BA(self) -> torch.Tensor:
        """vLLM's log-probs."""
        out_BA = torch.zeros(self.size, int(self.lengths_B().max()))
        for b, answer in enumerate(self.answers):
            out_BA[b, : len(answer.logps)] = torch.tensor(answer.logps)
        return out_BA

    def length(self, b: int) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompts[b]) + len(self.answers[b].tokens)

    def sample(self, b: int) -> Sample:
        """Prompt and answer as one sequence; the tokens that the model wrote are trained. -1 is a filler: the first one with weight 0."""
        weight, b = (1.0, b) if b >= 0 else (0.0, 0)
        prompt, answer = self.prompts[b], self.answers[b]
        mask = np.zeros(len(prompt) + len(answer.tokens), np.uint8)
        mask[len(prompt) :] = 1
        for start, stop in answer.observed:
            mask[len(prompt) + start : len(prompt) + stop] = 0
        return Sample(np.array(prompt + answer.tokens, np.int64), mask, b, weight)

    def take(self, rows: Sequence[int]) -> Rollout:
        return Rollout([self.prompts[b] for b in rows], [self.answers[b] for b in rows], [self.labels[b] for b in rows])

    def __add__(self, other: Rollout) -> Rollout:
        return Rollout(self.prompts + other.prompts, self.answers + other.answers, self.labels + other.labels)


def request_seed(*parts: int) -> int:
    """One seed for each (run seed, step, answer): independent of ranks and replicas."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])


def generate(
    engine: VLLMEngine,
    prompts: Sequence[list[int]],
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    step: int,
    labels: Sequence[Any],
    replicas: int,
    replica: int,
    first: int = 0,
    environments: Environments | None = None,
) -> Rollout:
    """n answers a prompt, or n conversations with `environments`. Collective: every replica takes its share, and all ranks get all.

    Answer i of prompt p has the seed (seed, step, first + p, i), and its later turns their own. What is expected of a prompt is its own
    length and n answers of the greatest length: that shares prompts out evenly by number, and their lengths too.

    Raises Interrupted on all ranks where the run is to stop (`engine.should_stop`).
    """
    costs = [len(p) + n * sampling.max_new_tokens for p in prompts]
    requests = [(p, i) for p in sorted(largest_differencing(costs, replicas)[replica]) for i in range(n)]

    def seed_of(k: int, turn: int = 0) -> int:
        p, i = requests[k]
        return request_seed(seed, step, first + p, i, *([turn] if turn else []))

    mine, failure, left = [prompts[p] for p, _ in requests], None, False
    answers: list[Answer] = []
    try:
        if environments is None:
            answers = engine.generate(mine, [seed_of(k) for k in range(len(mine))], sampling)
        else:
            answers = environments.converse(engine, mine, [labels[p] for p, _ in requests], seed_of, sampling)
    except ToolError as error:  # the other replicas wait for the answers: they must hear of it
        failure = error
    except Interrupted:
        left = True
    watch.phase("waiting for the other replicas' answers")
    if state.on_any_rank(left):
        raise Interrupted
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, failure or dict(zip(requests, answers, strict=True)))
    for part in parts:
        if isinstance(part, ToolError):
            raise part
    everything = {key: answer for part in parts for key, answer in part.items()}
    keys = [(p, i) for p in range(len(prompts)) for i in range(n)]
    return Rollout([prompts[p] for p, _ in keys], [everything[k] for k in keys], [labels[p] for p, _ in keys])


def micro_batches(rollout: Rollout, rows: Sequence[int], plan: BatchPlan) -> list[MicroBatch]:
    """This rank's share of `rows`, -1 for a filler."""
    parts = plan.split(rows, lambda b: [rollout.length(b)])
    options: dict[str, Any] = {"packing": plan.packing, "pad_multiple": plan.pad_multiple}
    batches = [collate([rollout.sample(b) for b in part], **options) for part in parts]
    return [replace(batch, place_BT=_places(batch)) for batch in batches]


def _places(batch: MicroBatch) -> torch.Tensor:
    """[B, T]: which token of its answer each masked-in position predicts, 0 elsewhere."""
    keep_BT = batch.mask_BT.bool()
    count_BT = batch.mask_BT.long().view(-1).cumsum(0).view_as(keep_BT)  # answers stand one after another, in one row or in several
    lengths_N = batch.sum_N(batch.mask_BT).long()
    before_N = lengths_N.cumsum(0) - lengths_N
    return torch.where(keep_BT, count_BT - 1 - before_N[_samples(batch)], 0)


def _samples(batch: MicroBatch) -> torch.Tensor:
    """[B, T]: the sample of each token, some sample at padding."""
    return batch.segments_BT.clamp(max=batch.num_samples - 1)


def spread(batch: MicroBatch, table_BA: torch.Tensor) -> torch.Tensor:
    """Rows of a table at the positions of a micro-batch that predict those tokens: like tokens_BT, 0 elsewhere."""
    assert batch.place_BT is not None
    values_BT = table_BA.to(batch.mask_BT.device)[batch.index_N[_samples(batch)], batch.place_BT]
    return values_BT * batch.mask_BT


def table(
    model: Model,
    batches: list[MicroBatch],
    fn: Callable[[torch.Tensor, MicroBatch], torch.Tensor],
    *,
    shape: tuple[int, int],
    channels: int = 1,
) -> list[torch.Tensor]:
    """`fn(output, batch)` -> [channels, B, T] at the predicting positions, as `channels` tables [B, A] on every rank, zeros beyond an answer."""
    tables = torch.zeros(channels, *shape, dtype=torch.float64)
    for batch, output_CBT in zip(batches, model.forward(batches, fn, channels=channels), strict=True):
        keep = batch.mask_BT.bool()
        lengths = batch.sum_N(batch.mask_BT).long().tolist()
        for c in range(channels):
            rows = output_CBT[c].cpu()[keep].double().split(lengths)
            for b, row in zip(batch.index_N.tolist(), rows, strict=True):
                tables[c, b, : len(row)] = row
    return [t.float() for t in state.sum_over_data_parallel(tables, model.groups)]
