from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.errors import ConfigError
from mrlhf.rl.policy_loss import policy_loss, value_loss

NAN = float("nan")
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def logps_for(*ratios: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps that require grad, old_logps, mask): one row whose token ratios are these."""
    old = torch.full((1, len(ratios)), -2.0)
    return (old + torch.tensor([ratios]).log()).requires_grad_(), old, torch.ones(1, len(ratios))


def naive_policy_loss(logps, old, advantages, mask, low, high, dual, sequence_ratio, aggregation):
    """Token by token in plain Python."""
    rows = []
    for b in range(len(logps)):
        where = mask[b].nonzero().flatten().tolist()
        log_ratios = [(logps[b, t] - old[b, t]).item() for t in where]
        if sequence_ratio:
            log_ratios = [sum(log_ratios) / max(len(where), 1)] * len(where)
        losses = []
        for t, log_ratio in zip(where, log_ratios, strict=True):
            r, a = math.exp(log_ratio), advantages[b, t].item()
            objective = min(r * a, min(max(r, 1 - low), 1 + high) * a)
            if dual is not None and a < 0:
                objective = max(objective, dual * a)
            losses.append(-objective)
        rows.append(losses)
    if aggregation == "token":
        return sum(map(sum, rows)) / max(sum(map(len, rows)), 1)
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / max(len(means), 1)


class TestPolicyLoss:
    def test_on_policy_ratio_is_exactly_one(self):
        logps = torch.randn(3, 5)
        loss, metrics = policy_loss(logps, logps, torch.ones(3, 5), torch.ones(3, 5), **CLIP)
        assert loss.item() == -1
        assert metrics["ratio_max_dev"].tolist() == [0, 1]
        assert metrics["ratio_mean"].tolist() == [15, 15]
        assert metrics["pg_clipfrac"].tolist() == [0, 15]
        assert metrics["ppo_kl"].tolist() == [0, 15]

    def test_clipping_by_hand(self):
        logps, old, mask = logps_for(2.0, 2.0, 0.5, 0.5)
        advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        loss, metrics = policy_loss(logps, old, advantages, mask, **CLIP)
        loss.backward()
        assert loss.item() == pytest.approx((-1.28 + 2 - 0.5 + 0.8) / 4)
        # only the pessimistic side carries a gradient: d loss / d logp = -ratio A / 4
        torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 2.0, -0.5, 0.0]]) / 4)
        assert metrics["pg_clipfrac"].tolist() == [2, 4]
        assert metrics["ratio_max_dev"][0].item() == pytest.approx(1)
        assert metrics["ratio_mean"][0].item() == pytest.approx(5)
        assert metrics["ppo_kl"][0].item() == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(metrics["pg_loss"], torch.tensor([-1.28 + 2 - 0.5 + 0.8, 4.0]))

    def test_dual_clip_bounds_the_loss_of_bad_tokens(self):
        logps, old, mask = logps_for(10.0, 2.0, 10.0)
        loss, _ = policy_loss(logps, old, torch.tensor([[-1.0, -1.0, 1.0]]), mask, **CLIP, dual_clip=3.0, denominator=1)
        loss.backward()
        assert loss.item() == pytest.approx(3 + 2 - 1.28)
        torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 2.0, 0.0]]))

    def test_sequence_ratio_by_hand(self):
        logps, old, mask = logps_for(4.0, 1.0)
        loss, metrics = policy_loss(
            logps, old, torch.tensor([[1.0, 1.0]]), mask, clip_low=0.2, clip_high=2.0, ratio="sequence"
        )
        loss.backward()
        assert loss.item() == pytest.approx(-2)
        assert metrics["ratio_mean"][0].item() == pytest.approx(4)
        assert metrics["ppo_kl"][0].item() == pytest.approx(-math.log(4))
        torch.testing.assert_close(logps.grad, torch.tensor([[-1.0, -1.0]]))

    def test_sequence_ratio_has_the_gradient_of_gspo(self):
        torch.manual_seed(0)
        logps, old = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
        mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
        advantage_B = torch.tensor([1.0, -2.0, 0.5])
        loss, _ = policy_loss(
            logps,
            old,
            advantage_B[:, None].expand(3, 6),
            mask,
            clip_low=0.9,
            clip_high=9.0,
            ratio="sequence",
            aggregation="sequence",
        )
        (gradient,) = torch.autograd.grad(loss, logps)
        ratio_B = (((logps - old) * mask).sum(1) / mask.sum(1)).exp()
        reference = -torch.minimum(ratio_B * advantage_B, ratio_B.clamp(0.1, 10) * advantage_B).mean()
        (expected,) = torch.autograd.grad(reference, logps)
        torch.testing.assert_close(loss, reference)
        torch.testing.assert_close(gradient, expected)

    @settings(max_examples=80, deadline=None)
    @given(
        st.integers(0, 10**6),
        st.sampled_from([None, 1.5, 3.0]),
        st.sampled_from(["token", "sequence"]),
        st.sampled_from(["token", "sequence"]),
    )
    def test_equals_the_loop(self, seed, dual, ratio, aggregation):
        generator = torch.Generator().manual_seed(seed)
        logps, old, advantages = (torch.randn(3, 7, generator=generator) for _ in range(3))
        mask = torch.randint(0, 2, (3, 7), generator=generator)
        loss, _ = policy_loss(
            logps, old, advantages, mask, **CLIP, dual_clip=dual, ratio=ratio, aggregation=aggregation
        )
        assert loss.item() == pytest.approx(
            naive_policy_loss(logps, old, advantages, mask, 0.2, 0.28, dual, ratio == "sequence", aggregation), abs=1e-4
        )

    @pytest.mark.parametrize("ratio", ["token", "sequence"])
    @pytest.mark.parametrize("aggregation", ["token", "sequence"])
    def test_packed_row_equals_padded_rows(self, ratio, aggregation):
        torch.manual_seed(0)
        logps, old, advantages = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
        mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]])
        padded, padded_metrics = policy_loss(logps, old, advantages, mask, **CLIP, ratio=ratio, aggregation=aggregation)
        packed, packed_metrics = policy_loss(
            *(x.view(1, 8) for x in (logps, old, advantages, mask)),
            **CLIP,
            ratio=ratio,
            aggregation=aggregation,
            segment_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]]),
            num_segments=2,
        )
        torch.testing.assert_close(packed, padded)
        torch.testing.assert_close(packed_metrics, padded_metrics)

    def test_micro_batches_with_the_step_denominator_add_up(self):
        torch.manual_seed(0)
        args = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5), torch.randint(0, 2, (4, 5))]
        whole, whole_metrics = policy_loss(*args, **CLIP)
        parts = [
            policy_loss(*(x[rows] for x in args), **CLIP, denominator=args[3].sum())
            for rows in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
        for name in ("pg_loss", "pg_clipfrac", "ppo_kl", "ratio_mean"):
            torch.testing.assert_close(sum(metrics[name] for _, metrics in parts), whole_metrics[name])

    def test_masked_nan_reaches_neither_loss_nor_gradient(self):
        logps = torch.tensor([[NAN, -1.0, -float("inf")]], requires_grad=True)
        other = torch.tensor([[NAN, -1.0, NAN]])
        for ratio in ("token", "sequence"):
            loss, metrics = policy_loss(
                logps,
                other,
                -other,
                torch.tensor([[0, 1, 0]]),
                **CLIP,
                ratio=ratio,
                dual_clip=3.0,
                rollout_logps=other,
                correction=("tis", 0.5, 2.0),
            )
            (gradient,) = torch.autograd.grad(loss, logps)
            assert loss.item() == -1
            assert gradient.tolist() == [[0, -1, 0]]
            assert all(metric.isfinite().all() for metric in metrics.values())

    def test_gradients_reach_logps_alone(self):
        tensors = [torch.randn(1, 3, requires_grad=True) for _ in range(4)]
        loss, metrics = policy_loss(
            *tensors[:3], torch.ones(1, 3), **CLIP, rollout_logps=tensors[3], correction=("tis", 0.5, 2.0)
        )
        loss.backward()
        assert [t.grad is None for t in tensors] == [False, True, True, True]
        assert not any(metric.requires_grad for metric in metrics.values())

    def test_wild_ratio_stays_finite(self):
        logps = torch.tensor([[0.0, -500.0]], requires_grad=True)
        loss, _ = policy_loss(
            logps, torch.tensor([[-500.0, 0.0]]), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2), **CLIP
        )
        loss.backward()
        assert loss.isfinite()
        assert logps.grad.isfinite().all()

    def test_inputs_stay_as_they_are_and_the_graph_of_the_caller_survives(self):
        # the entropy term of the caller comes from the same logits: an in-place edit here would break its backward
        logits = torch.randn(1, 4, 8, requires_grad=True)
        all_logps = logits.log_softmax(-1)
        logps = all_logps[..., 0]
        entropy = -(all_logps.exp() * all_logps).sum(-1).mean()
        before = logps.detach().clone()
        loss, _ = policy_loss(logps, before + 0.1, torch.randn(1, 4), torch.ones(1, 4), **CLIP, ratio="sequence")
        (loss - 0.01 * entropy).backward()
        assert torch.equal(logps.detach(), before)
        assert logits.grad.isfinite().all()


class TestCorrection:
    def test_tis_truncates_and_icepop_drops(self):
        logps, old, mask = logps_for(1.0, 1.0, 1.0)
        rollout = old - torch.tensor([[0.25, 1.5, 8.0]]).log()
        args = (logps, old, torch.ones(1, 3), mask)
        tis, _ = policy_loss(*args, **CLIP, rollout_logps=rollout, correction=("tis", 0.5, 2.0))
        (tis_gradient,) = torch.autograd.grad(tis, logps)
        assert tis.item() == pytest.approx(-(0.5 + 1.5 + 2) / 3)
        torch.testing.assert_close(tis_gradient, -torch.tensor([[0.5, 1.5, 2.0]]) / 3)
        icepop, _ = policy_loss(*args, **CLIP, rollout_logps=rollout, correction=("icepop", 0.5, 2.0))
        (icepop_gradient,) = torch.autograd.grad(icepop, logps)
        assert icepop.item() == pytest.approx(-1.5 / 3)
        torch.testing.assert_close(icepop_gradient, -torch.tensor([[0.0, 1.5, 0.0]]) / 3)

    @pytest.mark.parametrize("kind", ["tis", "icepop"])
    def test_equal_engines_change_nothing(self, kind):
        torch.manual_seed(0)
        args = [torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3)]
        corrected, _ = policy_loss(*args, **CLIP, rollout_logps=args[1], correction=(kind, 0.5, 2.0))
        assert torch.equal(corrected, policy_loss(*args, **CLIP)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": "row"},
        {"aggregation": "row"},
        {"dual_clip": 1.0},
        {"clip_low": -0.1},
        {"correction": ("tis", 0.5, 2.0)},
        {"correction": ("tis", 2.0, 0.5), "rollout_logps": torch.ones(1, 2)},
        {"correction": ("pop", 0.5, 2.0), "rollout_logps": torch.ones(1, 2)},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError):
        policy_loss(*[torch.ones(1, 2)] * 4, **{**CLIP, **options})


class TestValueLoss:
    def test_without_clip(self):
        values = torch.tensor([[1.0, 3.0, NAN]], requires_grad=True)
        loss, metrics = value_loss(
            values, torch.full((1, 3), NAN), torch.tensor([[0.0, 1.0, NAN]]), torch.tensor([[1, 1, 0]])
        )
        loss.backward()
        assert loss.item() == pytest.approx(0.5 * (1 + 4) / 2)
        assert values.grad.tolist() == [[0.5, 1, 0]]
        assert metrics["vf_loss"].tolist() == [2.5, 2]
        assert metrics["vf_clipfrac"].tolist() == [0, 2]

    def test_clip_by_hand_with_gradient(self):
        # old 0, clip 0.5. V = 2, R = 2: the clipped error 1.5 wins, no gradient.
        # V = 2, R = -1: the unclipped 3 wins. V = 0.25: inside
        values = torch.tensor([[2.0, 2.0, 0.25]], requires_grad=True)
        loss, metrics = value_loss(
            values, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, 1.0]]), torch.ones(1, 3), clip=0.5, denominator=1
        )
        loss.backward()
        assert loss.item() == pytest.approx(0.5 * (1.5**2 + 3**2 + 0.75**2))
        assert values.grad.tolist() == [[0, 3, -0.75]]
        assert metrics["vf_clipfrac"].tolist() == [1, 3]

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6))
    def test_equals_the_loop(self, seed):
        generator = torch.Generator().manual_seed(seed)
        values, old, returns = (torch.randn(2, 5, generator=generator) for _ in range(3))
        mask = torch.randint(0, 2, (2, 5), generator=generator)
        total = 0.0
        for v, o, r, m in zip(*(x.flatten().tolist() for x in (values, old, returns, mask)), strict=True):
            total += m * 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)
        assert value_loss(values, old, returns, mask, clip=0.2)[0].item() == pytest.approx(
            total / max(mask.sum().item(), 1), rel=1e-4, abs=1e-6
        )

    def test_rounding_is_not_counted_as_clipping(self):
        values = torch.randn(1, 1000)
        _, metrics = value_loss(
            values,
            values + 0.1 * torch.randn(1, 1000).clamp(-1, 1),
            torch.randn(1, 1000),
            torch.ones(1, 1000),
            clip=0.2,
        )
        assert metrics["vf_clipfrac"][0] == 0

    def test_wrong_clip(self):
        with pytest.raises(ConfigError, match="value clip"):
            value_loss(*[torch.ones(1, 2)] * 4, clip=0.0)
