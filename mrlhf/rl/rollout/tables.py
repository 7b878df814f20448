"""A rollout: answers to prompts from every vLLM replica, and its per-token tables, from which PPO computes.

Letters: B answers of the rollout (all ranks), A tokens of the longest answer, T tokens of a micro-batch row, N samples
of a micro-batch, C channels. Answer b belongs to prompt b // n. Every rank holds the tables [B, A] of the whole rollout
(a few floats a token); each data-parallel rank computes the rows of its micro-batches, and an all-reduce sums the
tables. Only tokens that the model wrote are in a table, a loss, the KL and the advantages. The models also read the
observations that an environment puts between the turns.
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

Request = tuple[int, int]  # prompt of the rollout, its answer


@dataclass(frozen=True)
class Rollout:
    """`prompts[b]`, `answers[b]` and `labels[b]` of every answer b. A prompt with n answers occurs n times."""

    prompts: list[list[int]]
    answers: list[Answer]
    labels: list[Any]

    @property
    def size(self) -> int:
        return len(self.answers)

    def lengths_B(self) -> torch.Tensor:
        return torch.tensor([len(a.logps) for a in self.answers])

    def mask_BA(self) -> torch.Tensor:
        """1 on the tokens of each answer."""
        lengths_B = self.lengths_B()
        return (torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]).float()

    def rollout_logps_BA(self) -> torch.Tensor:
        """vLLM's log-probs."""
        out_BA = torch.zeros(self.size, int(self.lengths_B().max()))
        for b, answer in enumerate(self.answers):
            out_BA[b, : len(answer.logps)] = torch.tensor(answer.logps)
        return out_BA

    def length(self, b: int) -> int:
        """Tokens of prompt and answer b, observations included."""
        return len(self.prompts[b]) + len(self.answers[b].tokens)

    def sample(self, b: int) -> Sample:
        """Prompt and answer as one sequence, whose model-written tokens are trained. b = -1: a filler of weight 0."""
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
    """The seed of one answer from (run seed, step, prompt, answer, turn): independent of ranks and replicas."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])


def generate_rollout(engine: VLLMEngine, prompts: Sequence[list[int]], *, n: int, sampling: Sampling, seed: int,
                     step: int, labels: Sequence[Any], replicas: int, replica: int, first: int = 0,
                     environments: Environments | None = None) -> Rollout:
    """n answers a prompt, or n conversations with `environments`. Collective; all ranks get all answers.

    Answer i of prompt p has the seed (seed, step, first + p, i), and each later turn its own. Prompts are
    distributed over the replicas by their cost, the prompt's length plus n answers of the maximum length: every replica
    gets about as many prompts and as many tokens.

    Raises Interrupted on all ranks if `engine.should_stop` on any, and any replica's ToolError on all ranks.
    """
    costs = [len(p) + n * sampling.max_new_tokens for p in prompts]
    requests = [(p, i) for p in sorted(largest_differencing(costs, replicas)[replica]) for i in range(n)]
    own_prompts = [prompts[p] for p, _ in requests]

    def seed_of(k: int, turn: int = 0) -> int:
        p, i = requests[k]
        return request_seed(seed, step, first + p, i, *([turn] if turn else []))

    def generate() -> list[Answer]:
        if environments is None:
            return engine.generate(own_prompts, [seed_of(k) for k in range(len(requests))], sampling)
        own_labels = [labels[p] for p, _ in requests]
        return environments.run_conversations(engine, own_prompts, own_labels, seed_of, sampling)

    answers = _gather_answers(requests, generate)
    keys = [(p, i) for p in range(len(prompts)) for i in range(n)]
    return Rollout([prompts[p] for p, _ in keys], [answers[k] for k in keys], [labels[p] for p, _ in keys])


def _gather_answers(requests: list[Request], generate: Callable[[], list[Answer]]) -> dict[Request, Answer]:
    """The answers of all replicas; `generate` makes those to this replica's requests. Collective, errors included."""
    part: Any = None
    interrupted = False
    try:
        part = dict(zip(requests, generate(), strict=True))
    except ToolError as error:  # the other replicas wait for this one's answers
        part = error
    except Interrupted:
        interrupted = True
    watch.set_phase("waiting for the other replicas' answers")
    if state.on_any_rank(interrupted):
        raise Interrupted
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    for part in parts:
        if isinstance(part, ToolError):
            raise part
    return {request: answer for part in parts for request, answer in part.items()}


def micro_batches(rollout: Rollout, rows: Sequence[int], plan: BatchPlan) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of `rows`, where -1 is a filler."""
    parts = plan.split(rows, lambda b: [rollout.length(b)])
    options: dict[str, Any] = {"packing": plan.packing, "pad_multiple": plan.pad_multiple}
    batches = [collate([rollout.sample(b) for b in part], **options) for part in parts]
    return [replace(batch, place_BT=_places(batch)) for batch in batches]


def _places(batch: MicroBatch) -> torch.Tensor:
    """[B, T]: the index in its answer of the token that each masked-in position predicts, 0 elsewhere."""
    keep_BT = batch.mask_BT.bool()
    # answers follow one another in the flattened micro-batch, packed or padded
    count_BT = batch.mask_BT.long().view(-1).cumsum(0).view_as(keep_BT)
    lengths_N = batch.sum_N(batch.mask_BT).long()
    before_N = lengths_N.cumsum(0) - lengths_N
    return torch.where(keep_BT, count_BT - 1 - before_N[_samples(batch)], 0)


def _samples(batch: MicroBatch) -> torch.Tensor:
    """[B, T]: the sample of each token; padding gets any sample."""
    return batch.segments_BT.clamp(max=batch.num_samples - 1)


def gather_table(batch: MicroBatch, table_BA: torch.Tensor) -> torch.Tensor:
    """A table's values at the positions of a micro-batch that predict these tokens: shape of tokens_BT, 0 elsewhere."""
    assert batch.place_BT is not None
    table_BA, index_N = (x.to(batch.mask_BT.device, non_blocking=True) for x in (table_BA, batch.index_N))
    values_BT = table_BA[index_N[_samples(batch)], batch.place_BT]
    return values_BT * batch.mask_BT


def compute_tables(model: Model, batches: list[MicroBatch], fn: Callable[[torch.Tensor, MicroBatch], torch.Tensor], *,
                   shape: tuple[int, int], channels: int = 1) -> list[torch.Tensor]:
    """Forward passes over `batches`: `channels` tables of `shape` [B, A] on every rank, zero beyond each answer.

    fn(output, batch) -> [channels, B, T], of which the values at the positions that predict an answer token are taken.
    """
    tables = torch.zeros(channels, *shape, dtype=torch.float64)
    for batch, output_CBT in zip(batches, model.forward(batches, fn, channels=channels), strict=True):
        keep = batch.mask_BT.bool()
        lengths = batch.sum_N(batch.mask_BT).long().tolist()
        for c in range(channels):
            rows = output_CBT[c].cpu()[keep].double().split(lengths)
            for b, row in zip(batch.index_N.tolist(), rows, strict=True):
                tables[c, b, : len(row)] = row
    return [t.float() for t in state.sum_over_data_parallel(tables, model.groups)]
