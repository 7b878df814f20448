from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.errors import ConfigError
from mrlhf.losses import accuracy_by_margin, dpo_loss, masked_cross_entropy, pairwise_loss, sequence_means

NAN = float("nan")
LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
MASK = torch.tensor([[0, 1, 1], [1, 0, 0]])


def mean(metric):
    return (metric[0] / metric[1]).item()


class TestMaskedCrossEntropy:
    def test_token_mean_is_over_all_trained_tokens(self):
        assert masked_cross_entropy(LOGPS, MASK).item() == pytest.approx((2 + 3 + 4) / 3)

    def test_sequence_mean_is_the_mean_of_row_means(self):
        assert masked_cross_entropy(LOGPS, MASK, aggregation="sequence").item() == pytest.approx((2.5 + 4) / 2)

    def test_given_denominator_replaces_the_count(self):
        assert masked_cross_entropy(LOGPS, MASK, denominator=1).item() == pytest.approx(9)
        assert masked_cross_entropy(LOGPS, MASK, denominator=torch.tensor(6.0)).item() == pytest.approx(1.5)
        assert masked_cross_entropy(LOGPS, MASK, denominator=4, aggregation="sequence").item() == pytest.approx(6.5 / 4)

    @pytest.mark.parametrize("aggregation", ["token", "sequence"])
    def test_packed_row_equals_padded_rows(self, aggregation):
        packed = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]])
        mask = torch.tensor([[0, 1, 1, 1, 0]])
        ids = torch.tensor([[0, 0, 0, 1, -1]])
        loss = masked_cross_entropy(packed, mask, aggregation=aggregation, segment_ids=ids, num_segments=2)
        assert loss.item() == pytest.approx(masked_cross_entropy(LOGPS, MASK, aggregation=aggregation).item())

    def test_sequence_without_trained_tokens_does_not_count(self):
        mask = torch.tensor([[0, 1, 1], [0, 0, 0]])
        assert masked_cross_entropy(LOGPS, mask, aggregation="sequence").item() == pytest.approx(2.5)
        packed = masked_cross_entropy(
            LOGPS.view(1, 6),
            mask.view(1, 6),
            aggregation="sequence",
            segment_ids=torch.tensor([[0, 0, 0, 2, 2, 2]]),
            num_segments=5,
        )
        assert packed.item() == pytest.approx(2.5)

    @pytest.mark.parametrize("aggregation", ["token", "sequence"])
    def test_masked_nan_reaches_neither_loss_nor_gradient(self, aggregation):
        logps = torch.tensor([[NAN, -2.0, -float("inf")]], requires_grad=True)
        loss = masked_cross_entropy(logps, torch.tensor([[0, 1, 0]]), aggregation=aggregation)
        loss.backward()
        assert loss.item() == 2
        assert logps.grad.tolist() == [[0, -1, 0]]

    def test_weights_stand_in_numerator_and_denominator(self):
        """Losses 2 and 3 of weight 1, 4 of weight 0.5."""
        weight = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
        assert masked_cross_entropy(LOGPS, MASK, weight=weight).item() == pytest.approx((2 + 3 + 0.5 * 4) / 2.5)
        assert masked_cross_entropy(LOGPS, MASK, weight=7 * weight).item() == pytest.approx((2 + 3 + 0.5 * 4) / 2.5)
        assert masked_cross_entropy(LOGPS, MASK, weight=weight, aggregation="sequence").item() == pytest.approx(
            (2.5 + 0.5 * 4) / 1.5
        )

    @pytest.mark.parametrize("aggregation", ["token", "sequence"])
    def test_weight_2_is_standing_there_twice(self, aggregation):
        weight = torch.tensor([[2.0], [1.0]]).expand_as(LOGPS)
        twice = masked_cross_entropy(
            torch.cat([LOGPS, LOGPS[:1]]), torch.cat([MASK, MASK[:1]]), aggregation=aggregation
        ).item()
        assert masked_cross_entropy(LOGPS, MASK, weight=weight, aggregation=aggregation).item() == pytest.approx(twice)
        packed = {"segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1]]), "num_segments": 2}
        flat = masked_cross_entropy(
            LOGPS.view(1, 6), MASK.view(1, 6), weight=weight.reshape(1, 6), aggregation=aggregation, **packed
        )
        assert flat.item() == pytest.approx(twice)

    def test_all_masked_gives_a_differentiable_zero(self):
        logps = LOGPS.clone().requires_grad_()
        loss = masked_cross_entropy(logps, torch.zeros_like(MASK))
        loss.backward()
        assert loss.item() == 0
        assert not logps.grad.any()

    @pytest.mark.parametrize("aggregation,denominator", [("token", 3), ("sequence", 2)])
    def test_micro_batches_with_the_step_denominator_add_up(self, aggregation, denominator):
        whole = masked_cross_entropy(LOGPS, MASK, aggregation=aggregation)
        parts = [
            masked_cross_entropy(LOGPS[i : i + 1], MASK[i : i + 1], aggregation=aggregation, denominator=denominator)
            for i in range(2)
        ]
        assert sum(parts).item() == pytest.approx(whole.item())

    def test_bfloat16_is_summed_in_fp32(self):
        logps = torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
        loss = masked_cross_entropy(logps, torch.ones(1, 4096), denominator=1)
        assert loss.dtype == torch.float32
        assert loss.item() == 4096

    def test_wrong_calls_are_refused(self):
        with pytest.raises(ConfigError, match="aggregation = 'tokens' is unknown"):
            masked_cross_entropy(LOGPS, MASK, aggregation="tokens")
        with pytest.raises(ValueError, match="shapes differ"):
            masked_cross_entropy(LOGPS, MASK[:1])
        with pytest.raises(ValueError, match="num_segments"):
            sequence_means(LOGPS, MASK, segment_ids=torch.zeros_like(MASK))


class TestPairwiseLoss:
    @pytest.mark.parametrize("kind", ["sigmoid", "logexp"])
    def test_by_hand(self, kind):
        loss, metrics = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), kind=kind)
        assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)
        assert metrics["accuracy"].tolist() == [1, 2]
        assert metrics["margin"].tolist() == [-1, 2]
        assert metrics["mean_reward"].tolist() == [3, 4]
        assert metrics["min_reward"].tolist() == [0, 1]
        assert metrics["max_reward"].tolist() == [2, 1]

    @pytest.mark.parametrize("kind", ["sigmoid", "logexp"])
    def test_margin_is_honoured(self, kind):
        chosen, rejected = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])
        loss, metrics = pairwise_loss(chosen, rejected, margin=torch.tensor([1.0, 3.0]), kind=kind)
        assert loss.item() == pytest.approx(math.log(2))
        assert metrics["margin"].tolist() == [4, 2]
        assert pairwise_loss(chosen[:1], rejected[:1], margin=1.0, kind=kind)[0].item() == pytest.approx(math.log(2))

    @pytest.mark.parametrize("kind", ["sigmoid", "logexp"])
    def test_huge_differences_are_safe(self, kind):
        chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
        loss, _ = pairwise_loss(chosen, torch.zeros(2), kind=kind, denominator=1)
        loss.backward()
        assert loss.item() == pytest.approx(1e4)
        assert chosen.grad.tolist() == [-1, 0]

    def test_padding_pairs_count_nowhere(self):
        chosen = torch.tensor([1.0, NAN], requires_grad=True)
        loss, metrics = pairwise_loss(
            chosen, torch.tensor([0.0, 50.0]), margin=torch.tensor([0.5, NAN]), weight=torch.tensor([1, 0])
        )
        loss.backward()
        alone, alone_metrics = pairwise_loss(torch.tensor([1.0]), torch.tensor([0.0]), margin=0.5)
        assert loss.item() == pytest.approx(alone.item())
        assert chosen.grad[1] == 0
        assert {k: v.tolist() for k, v in metrics.items()} == {k: v.tolist() for k, v in alone_metrics.items()}

    def test_unknown_kind(self):
        with pytest.raises(ConfigError, match="kind"):
            pairwise_loss(torch.ones(1), torch.ones(1), kind="hinge")


def test_accuracy_by_margin():
    """Differences 0.2, -0.3, 0 (a tie is not right), 0.5, -1.9, 2, inf; the last pair is padding."""
    chosen = torch.tensor([0.2, 0.0, 1.0, 0.5, 0.0, 3.0, float("inf"), NAN])
    rejected = torch.tensor([0.0, 0.3, 1.0, 0.0, 1.9, 1.0, 0.0, 0.0])
    found = accuracy_by_margin(chosen, rejected, weight=torch.tensor([1, 1, 1, 1, 1, 1, 1, 0]))
    assert {name: value.tolist() for name, value in found.items()} == {
        "accuracy_by_margin/0-0.5": [1, 3],
        "accuracy_by_margin/0.5-1": [1, 1],
        "accuracy_by_margin/1-2": [0, 1],
        "accuracy_by_margin/2+": [1, 1],
    }


def test_accuracy_does_not_count_rounding():
    scores = torch.tensor([1.0, -3.3333333, 1e4])
    higher = scores + torch.tensor([1.2e-7, 2.4e-7, 1e-3])
    _, metrics = pairwise_loss(higher, scores)
    assert mean(metrics["accuracy"]) == 0
    buckets = accuracy_by_margin(higher, scores, weight=torch.ones(3))
    assert buckets["accuracy_by_margin/0-0.5"].tolist() == [0, 3]
    assert mean(pairwise_loss(scores + 1e-1, scores)[1]["accuracy"]) == 1


class TestDpoLoss:
    @pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-4])
    def test_accuracy_does_not_count_rounding(self, noise):
        pc, pr = torch.tensor([-50.0, -80.0, -60.0]), torch.tensor([-40.0, -90.0, -55.0])
        rc = pc - torch.tensor([noise, -noise, noise])
        assert mean(dpo_loss(pc, pr, rc, pr, beta=0.1)[1]["rewards/accuracies"]) == 0
        assert mean(dpo_loss(pc, pr, pc - 0.01, pr, beta=0.1)[1]["rewards/accuracies"]) == 1

    def test_first_loss_is_ln_2(self):
        pc, pr = torch.tensor([-812.25, -3.0]), torch.tensor([-700.5, -9.0])
        loss, metrics = dpo_loss(pc, pr, pc, pr, beta=0.1)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
        assert mean(metrics["rewards/accuracies"]) == 0
        assert mean(metrics["rewards/margins"]) == 0

    def test_by_hand(self):
        # policy - reference: chosen 2, rejected -1; d = 3, beta d = 1.5
        args = [torch.tensor([x]) for x in (-10.0, -21.0, -12.0, -20.0)]
        loss, metrics = dpo_loss(*args, beta=0.5)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))
        assert mean(metrics["rewards/chosen"]) == 1
        assert mean(metrics["rewards/rejected"]) == -0.5
        assert mean(metrics["rewards/margins"]) == 1.5
        assert mean(metrics["rewards/accuracies"]) == 1
        assert mean(metrics["logps/chosen"]) == -10
        assert mean(metrics["logps/rejected"]) == -21
        smooth, _ = dpo_loss(*args, beta=0.5, label_smoothing=0.1)
        assert smooth.item() == pytest.approx(0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5)))
        assert dpo_loss(*args, beta=0.5, kind="ipo")[0].item() == pytest.approx((3 - 1) ** 2)
        assert dpo_loss(*args, beta=0.5, kind="hinge")[0].item() == 0
        assert dpo_loss(*args, beta=0.1, kind="hinge")[0].item() == pytest.approx(0.7)

    @pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
    def test_padding_pairs_count_nowhere(self, kind):
        pc = torch.tensor([-1.0, NAN], requires_grad=True)
        pr, rc, rr = torch.tensor([-2.0, 0.0]), torch.tensor([-1.5, 0.0]), torch.tensor([-1.0, 9.0])
        loss, metrics = dpo_loss(pc, pr, rc, rr, beta=0.3, kind=kind, weight=torch.tensor([1.0, 0.0]))
        loss.backward()
        alone, alone_metrics = dpo_loss(pc[:1].detach(), pr[:1], rc[:1], rr[:1], beta=0.3, kind=kind)
        assert loss.item() == pytest.approx(alone.item())
        assert pc.grad[1] == 0
        assert {k: v.tolist() for k, v in metrics.items()} == {k: v.tolist() for k, v in alone_metrics.items()}

    def test_fp32_keeps_small_differences_of_long_answers(self):
        pc, pr = torch.tensor([-4000.25]), torch.tensor([-0.125])
        _, metrics = dpo_loss(pc, pr, pc - 2**-11, pr + 2**-16, beta=1.0)
        assert mean(metrics["rewards/margins"]) == 2**-11 + 2**-16

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"beta": 0.1, "kind": "dpo"}, "kind"),
            ({"beta": 0.0}, "beta"),
            ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing"),
            ({"beta": 0.1, "label_smoothing": 0.1, "kind": "ipo"}, "no meaning"),
        ],
    )
    def test_wrong_options_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            dpo_loss(*[torch.zeros(1)] * 4, **options)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(*[st.floats(-500, 0, width=32)] * 4), min_size=1, max_size=6), st.floats(0.01, 1))
    def test_swapping_the_answers_mirrors_the_metrics(self, rows, beta):
        pc, pr, rc, rr = torch.tensor(rows).unbind(1)
        _, metrics = dpo_loss(pc, pr, rc, rr, beta=beta)
        _, mirrored = dpo_loss(pr, pc, rr, rc, beta=beta)
        assert torch.equal(metrics["rewards/chosen"], mirrored["rewards/rejected"])
        torch.testing.assert_close(metrics["rewards/margins"][0], -mirrored["rewards/margins"][0])
