"""The auxiliary losses of routers are the papers' formulae, of every sample by itself; ../test_training.py trains with
them.
"""

from __future__ import annotations

import math

import pytest

import mrlhf.parallel  # noqa: F401

# isort: split
import torch

from mrlhf.data.loader import Sample, collate
from mrlhf.models.families.spec import Experts
from mrlhf.models.layers.router import choose_experts, expert_scores
from mrlhf.models.layers.router_losses import balancing_sum, token_samples, z_sum


def literal(p_TE: torch.Tensor, chosen: list[list[int]], experts: int) -> torch.Tensor:
    """Switch Transformer, eq. 4 to 6 of one batch: N sum_i f_i P_i, a token counting 1/K for each of its K choices."""
    total = torch.zeros(())
    for i in range(experts):
        f = sum(row.count(i) for row in chosen) / sum(map(len, chosen))
        total = total + f * torch.stack([p[i] for p in p_TE]).mean()
    return experts * total


def test_balancing_loss_is_the_papers_for_every_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    sample_T = torch.tensor([0, 0, 0, -1, 1, 1, -1, 2, 2, 2, 2, 0])
    for kind in ("softmax", "sigmoid"):
        experts = Experts(5, 2, 8, score=kind)  # type: ignore[arg-type]
        logits = torch.randn(len(sample_T), 5, generator=generator).requires_grad_()
        s_TE = expert_scores(logits, experts)
        chosen_TK, _ = choose_experts(s_TE, experts, None)
        ours = balancing_sum(s_TE, chosen_TK, sample_T, samples=4)
        wanted = torch.zeros(())
        for sample in (0, 1, 2):
            rows = sample_T == sample
            p = s_TE[rows] / s_TE[rows].sum(-1, keepdim=True)
            wanted = wanted + int(rows.sum()) * literal(p, chosen_TK[rows].tolist(), 5)
        torch.testing.assert_close(ours, wanted)
        (a,), (b,) = torch.autograd.grad(ours, logits, retain_graph=True), torch.autograd.grad(wanted, logits)
        torch.testing.assert_close(a, b)
        assert a[sample_T < 0].abs().max() == 0 and a[sample_T >= 0].abs().min() > 0


def test_balanced_is_one_and_a_single_expert_as_many_as_there_are() -> None:
    sample_T = torch.zeros(8, dtype=torch.long)
    round_robin = torch.arange(8)[:, None] % 4
    assert float(balancing_sum(torch.full((8, 4), 0.25), round_robin, sample_T, samples=1)) / 8 == 1.0
    always = torch.zeros(8, 4).index_fill(1, torch.tensor([2]), 1.0)
    assert float(balancing_sum(always, torch.full((8, 1), 2), sample_T, samples=1)) / 8 == 4.0


def test_z_loss() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]])
    wanted = math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2
    assert float(z_sum(logits, torch.tensor([0, 1, -1]))) == pytest.approx(wanted)


def test_padding_and_fillers_belong_to_no_sample() -> None:
    rows = [
        Sample(torch.arange(n).numpy(), torch.ones(n).numpy(), i, weight=float(i != 1)) for i, n in enumerate((3, 2, 1))
    ]
    assert token_samples(collate(rows, packing=True, pad_multiple=4)).tolist() == [[0, 0, 0, -1, -1, 2, -1, -1]]
    assert token_samples(collate(rows, packing=False)).tolist() == [[0, 0, 0], [-1, -1, -1], [2, -1, -1]]


def test_groups_and_bias_of_the_choice() -> None:
    s = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.3]])
    best = Experts(6, 2, 8, renormalise=False, score="sigmoid", groups=3, top_groups=1)
    chosen, weights = choose_experts(s, best, None)
    assert sorted(chosen[0].tolist()) == [0, 1] and sorted(weights[0].tolist()) == sorted(s[0, :2].tolist())
    two = Experts(6, 2, 8, score="sigmoid", groups=3, top_groups=1, group_score="best_two", weight_scale=2.0)
    chosen, weights = choose_experts(s, two, None)
    assert sorted(chosen[0].tolist()) == [2, 3] and abs(float(weights.sum()) - 2.0) < 1e-6
    chosen, weights = choose_experts(s, two, torch.tensor([0.0, 0, 0, 0, 1, 1]))
    assert sorted(chosen[0].tolist()) == [4, 5]
    torch.testing.assert_close(weights.sort().values, torch.tensor([[0.8, 1.2]]))
