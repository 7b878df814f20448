from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.rl.kl import AdaptiveKL, FixedKL, kl_estimate


@pytest.mark.parametrize(
    "kind,expected", [("k1", [2.0, -1.0, 0.0]), ("k2", [2.0, 0.5, 0.0]), ("k3", [math.exp(-2) + 1, math.e - 2, 0.0])]
)
def test_by_hand(kind, expected):
    estimate = kl_estimate(torch.tensor([[-1.0, -3.0, -2.0]]), torch.tensor([[-3.0, -2.0, -2.0]]), kind=kind)
    torch.testing.assert_close(estimate, torch.tensor([expected]))


@pytest.mark.parametrize("kind,expected", [("k1", [10, -10]), ("k2", [10, 10]), ("k3", [10, 10])])
def test_far_apart_is_clamped_with_finite_gradient(kind, expected):
    logps = torch.tensor([[0.0, -1000.0]], requires_grad=True)
    estimate = kl_estimate(logps, torch.tensor([[-1000.0, 0.0]]), kind=kind)
    estimate.sum().backward()
    assert estimate.tolist() == [expected]
    assert logps.grad.tolist() == [[0, 0]]


def test_bfloat16_input_gives_fp32():
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert kl_estimate(x, x, kind="k3").dtype == torch.float32


def test_expectation_of_k1_and_k3_is_the_kl():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy * kl_estimate(policy.log(), reference.log(), kind=kind)).sum(), exact)


@settings(max_examples=50, deadline=None)
@given(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32))
def test_k2_and_k3_are_never_negative(logp, ref):
    for kind in ("k2", "k3"):
        assert kl_estimate(torch.tensor([[logp]]), torch.tensor([[ref]]), kind=kind).item() >= 0


def test_unknown_kind():
    with pytest.raises(ConfigError, match="kind = 'k4'"):
        kl_estimate(torch.ones(1, 1), torch.ones(1, 1), kind="k4")


def test_adaptive_follows_the_formula():
    kl = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    kl.update(6.6, 256)
    assert kl.value == pytest.approx(0.1 * (1 + 0.1 * 256 / 10_000))
    before = kl.value
    kl.update(600.0, 256)
    assert kl.value == pytest.approx(before * (1 + 0.2 * 256 / 10_000))
    before = kl.value
    kl.update(-3.0, 256)
    assert kl.value == pytest.approx(before * (1 - 0.2 * 256 / 10_000))


def test_adaptive_state_survives_a_reload():
    kl = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    kl.update(12.0, 256)
    again = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    again.load_state_dict(kl.state_dict())
    assert again.value == kl.value != 0.1
    with pytest.raises(CheckpointError, match="no adaptive KL"):
        again.load_state_dict(FixedKL(0.1).state_dict())


def test_fixed_never_changes_and_keeps_no_state():
    kl = FixedKL(0.05)
    kl.update(100.0, 1000)
    kl.load_state_dict(AdaptiveKL(0.1, target=6.0, horizon=10_000).state_dict())
    assert kl.value == 0.05


@pytest.mark.parametrize(
    "value,target,horizon", [(-0.1, 6, 100), (0.1, 0, 100), (0.1, 6, -1), (math.nan, 6, 100), (0.1, math.inf, 100)]
)
def test_wrong_settings_are_refused(value, target, horizon):
    with pytest.raises(ConfigError):
        AdaptiveKL(value, target=target, horizon=horizon)


def test_an_update_that_could_turn_beta_negative_or_nan_is_refused():
    kl = AdaptiveKL(0.1, target=6.0, horizon=100)
    with pytest.raises(ConfigError, match="too short for 500 answers"):
        kl.update(1.0, 500)
    with pytest.raises(ValueError, match="nan"):
        kl.update(math.nan, 8)
    assert kl.value == 0.1
