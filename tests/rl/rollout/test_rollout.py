"""Micro-batches of a rollout: every answer once, and its table's values at the positions that predict it,
whole or cut.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mrlhf.data.batching import BatchPlan
from mrlhf.data.loader import MicroBatch
from mrlhf.rl.rollout.tables import Rollout, gather_table, micro_batches
from mrlhf.rl.rollout.vllm_engine import Answer

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
