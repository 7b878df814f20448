"""Micro-batches of a rollout: every answer once, and its table's values at the positions that predict it,
whole or cut.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mrlhf.data.batching import BatchPlan
from mrlhf.data.loader import MicroBatch
from mrlhf.rl.rollout.tables import Rollout, gather_table, generate_rollout, micro_batches, request_seed
from mrlhf.rl.rollout.vllm_engine import Answer, Sampling

PROMPTS = [[5, 6], [5, 6], [7], [7]]
ANSWERS = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44]]
ROLLOUT = Rollout(PROMPTS, [Answer(tokens, [-0.5] * len(tokens), True) for tokens in ANSWERS], [None] * 4)
TABLE_BA = torch.tensor([a + [0] * (4 - len(a)) for a in ANSWERS]).float()  # of an answer's token: the token


def cut(rows: list[int], **changes: object) -> list[MicroBatch]:
    options = {
        "micro_batch_size": 2,
        "max_tokens": None,
        "dp_rank": 0,
        "dp_size": 1,
        "packing": True,
        "pad_multiple": 4,
        "micro_batch_multiple": 1,
    }
    return micro_batches(ROLLOUT, rows, BatchPlan(**{**options, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 12])
def test_a_position_gets_the_value_of_the_token_it_predicts(packing: bool, max_tokens: int | None) -> None:
    met: list[int] = []
    for batch in cut([3, 1, 0, 2], packing=packing, max_tokens=max_tokens):
        expected_BT = torch.where(batch.mask_BT.bool(), batch.targets_BT, 0).float()
        assert torch.equal(gather_table(batch, TABLE_BA), expected_BT)
        half = batch.tokens_BT.size(1) // 2
        for part in (slice(0, half), slice(half, None)):  # what a context-parallel rank has of it
            fields = {name: x[:, part] for name, x in vars(batch).items() if name.endswith("_BT") and x is not None}
            assert torch.equal(gather_table(replace(batch, **fields), TABLE_BA), expected_BT[:, part])
        met += batch.index_N.tolist()
        assert max_tokens is None or batch.tokens_BT.numel() <= max_tokens
    assert sorted(met) == [0, 1, 2, 3]


def test_a_rank_without_answers_gets_a_filler() -> None:
    one, other, filler = (cut([0, 3], max_tokens=8, dp_rank=rank, dp_size=3) for rank in range(3))
    assert [[b.index_N.tolist() for b in batches] for batches in (one, other)] in ([[[0]], [[3]]], [[[3]], [[0]]])
    assert len(filler) == 1 and filler[0].weights_N.tolist() == [0] and filler[0].mask_BT.sum() == 0
    assert not gather_table(filler[0], TABLE_BA).any()


def test_the_seed_of_an_answer_is_a_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """(run seed, step, prompt, answer), the same on any replica: a resumed run draws the same answers."""
    assert [request_seed(1, 2, 3, 0), request_seed(1, 2, 3, 0, 1), request_seed(2, 1, 3, 0)] == [
        3822189696,
        956539761,
        1539688509,
    ]
    seeds: dict[int, int] = {}

    def generate(prompts: list[list[int]], given: list[int], sampling: Sampling) -> list[Answer]:
        seeds.update(zip([10 * p[0] + i for p in prompts[::2] for i in (0, 1)], given, strict=True))
        return [Answer([0], [0.0], True) for _ in prompts]

    monkeypatch.setattr("mrlhf.rl.rollout.tables.state.on_any_rank", bool)
    monkeypatch.setattr("mrlhf.rl.rollout.tables.dist.get_world_size", lambda: 1)
    monkeypatch.setattr(
        "mrlhf.rl.rollout.tables.dist.all_gather_object", lambda parts, part: parts.__setitem__(0, part)
    )
    sampling, prompts = Sampling(1.0, 1.0, -1, 8, (), ()), [[0], [1], [2]]
    how = {"n": 2, "sampling": sampling, "seed": 7, "step": 5, "labels": [None] * 3, "first": 4}
    generate_rollout(SimpleNamespace(generate=generate), prompts, replicas=1, replica=0, **how)  # type: ignore[arg-type]
    assert seeds == {10 * p + i: request_seed(7, 5, 4 + p, i) for p in range(3) for i in (0, 1)}
