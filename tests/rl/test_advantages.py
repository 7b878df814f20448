from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.errors import ConfigError
from mrlhf.rl.advantages import compute_advantages, discounted_returns, gae, group_scores, token_rewards, whiten
from mrlhf.rl.shaping import RunningStd, informative_groups, scale_scores

NAN = float("nan")


def naive_gae(rewards, values, mask, gamma, lam):
    """The definition: A_t = sum over l of (gamma lam)^l delta_{t+l}, over the row's answer tokens, in double."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        where = mask[b].nonzero().flatten().tolist()
        r, v = rewards[b, where].double().tolist(), values[b, where].double().tolist() + [0.0]
        for t, position in enumerate(where):
            advantages[b, position] = sum(
                (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(len(where) - t)
            )
    return advantages.float(), (advantages + values.double() * mask).float()


@st.composite
def rollouts(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    mask = torch.zeros(rows, length, dtype=torch.long)
    for b in range(rows):
        start = draw(st.integers(0, length))
        mask[b, start : draw(st.integers(start, length))] = 1
    return torch.randn(rows, length, generator=generator), torch.randn(rows, length, generator=generator), mask


class TestGae:
    def test_by_hand(self):
        # one answer of two tokens between a prompt and a pad; gamma 0.5, lam 0.5
        rewards = torch.tensor([[9.0, 1.0, 2.0, 9.0]])
        values = torch.tensor([[9.0, 4.0, 8.0, 9.0]])
        advantages, returns = gae(rewards, values, torch.tensor([[0, 1, 1, 0]]), gamma=0.5, lam=0.5)
        # delta_2 = 2 - 8 = -6; delta_1 = 1 + 0.5 * 8 - 4 = 1; A_1 = 1 + 0.25 * -6 = -0.5
        assert advantages.tolist() == [[0, -0.5, -6, 0]]
        assert returns.tolist() == [[0, 3.5, 2, 0]]

    def test_defaults_of_ppo_with_zero_values_spread_the_score(self):
        rewards = torch.tensor([[0.0, 0.0, 1.0]])
        advantages, _ = gae(rewards, torch.zeros(1, 3), torch.ones(1, 3), gamma=1.0, lam=0.95)
        torch.testing.assert_close(advantages, torch.tensor([[0.9025, 0.95, 1.0]]))

    @settings(max_examples=80, deadline=None)
    @given(rollouts(), st.floats(0, 1), st.floats(0, 1))
    def test_equals_the_double_loop(self, rollout, gamma, lam):
        rewards, values, mask = rollout
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
        expected_advantages, expected_returns = naive_gae(rewards, values, mask, gamma, lam)
        torch.testing.assert_close(advantages, expected_advantages, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(returns, expected_returns, atol=2e-5, rtol=1e-5)

    def test_long_answers_stay_exact(self):
        torch.manual_seed(0)
        rewards, values, mask = torch.randn(2, 1500), torch.randn(2, 1500), torch.ones(2, 1500)
        mask[0, :700] = 0
        mask[1, 900:] = 0
        for gamma, lam in ((1.0, 1.0), (1.0, 0.95), (0.99, 0.9)):
            advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
            torch.testing.assert_close(
                advantages, naive_gae(rewards, values, mask, gamma, lam)[0], atol=1e-4, rtol=1e-4
            )

    def test_a_hole_in_the_mask_does_not_break_the_chain(self):
        advantages, _ = gae(
            torch.tensor([[1.0, NAN, 1.0]]),
            torch.tensor([[0.0, NAN, 2.0]]),
            torch.tensor([[1, 0, 1]]),
            gamma=1.0,
            lam=1.0,
        )
        assert advantages.tolist() == [[2, 0, -1]]

    def test_lambda_one_returns_are_the_discounted_returns(self):
        torch.manual_seed(0)
        rewards, values, mask = torch.randn(3, 9), torch.randn(3, 9), torch.ones(3, 9)
        torch.testing.assert_close(
            gae(rewards, values, mask, gamma=0.9, lam=1.0)[1], discounted_returns(rewards, mask, gamma=0.9)
        )

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="shapes differ"):
            gae(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3), gamma=1.0, lam=1.0)


class TestDiscountedReturns:
    def test_by_hand(self):
        returns = discounted_returns(
            torch.tensor([[NAN, 1.0, 2.0, 4.0, NAN]]), torch.tensor([[0, 1, 1, 1, 0]]), gamma=0.5
        )
        assert returns.tolist() == [[0, 3, 4, 4, 0]]


class TestTokenRewards:
    def test_by_hand(self):
        kl = torch.tensor([[NAN, 1.0, 2.0, NAN], [4.0, NAN, NAN, NAN]])
        mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
        rewards = token_rewards(torch.tensor([3.0, -20.0]), kl, mask, beta=0.5, clip=10)
        assert rewards.tolist() == [[0, -0.5, 2, 0], [-12, 0, 0, 0]]

    def test_without_clip_and_with_an_empty_row(self):
        rewards = token_rewards(torch.tensor([30.0, 5.0]), torch.zeros(2, 2), torch.tensor([[1, 1], [0, 0]]), beta=0.1)
        assert rewards.tolist() == [[0, 30], [0, 0]]

    def test_wrong_calls_are_refused(self):
        with pytest.raises(ConfigError, match="clip"):
            token_rewards(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), beta=0.1, clip=-1)
        with pytest.raises(ValueError, match="do not fit"):
            token_rewards(torch.ones(1, 1), torch.ones(1, 2), torch.ones(1, 2), beta=0.1)


def whiten_on_rank(rank: int, store: str, x: torch.Tensor, mask: torch.Tensor, results: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = slice(0, 1) if rank == 0 else slice(1, None)
    results[rank] = whiten(x[rows], mask[rows], group=dist.group.WORLD).tolist()
    dist.destroy_process_group()


class TestWhiten:
    def test_by_hand(self):
        white = whiten(torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[1, 1, 0]]))
        assert white.tolist() == [[-1, 1, 0]]

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40).filter(lambda x: max(x) - min(x) > 0.1),
        st.floats(-1000, 1000),
    )
    def test_mean_zero_variance_one(self, numbers, shift):
        x = torch.tensor(numbers) + shift
        white = whiten(x, torch.ones_like(x)).double()
        assert abs(white.mean().item()) < 1e-2
        assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-2)

    def test_constant_and_empty_input_give_zeros(self):
        assert not whiten(torch.full((3, 3), 0.1), torch.ones(3, 3)).any()
        assert not whiten(torch.full((3, 3), NAN), torch.zeros(3, 3)).any()

    def test_small_variance_on_a_large_mean(self):
        x = torch.tensor([[1000.0, 1001.0]]).expand(1000, 2)
        torch.testing.assert_close(whiten(x, torch.ones_like(x))[0], torch.tensor([-1.0, 1.0]))

    def test_over_two_ranks_equals_one(self, tmp_path):
        torch.manual_seed(0)
        x, mask = torch.randn(4, 6) * 3 + 100, torch.randint(0, 2, (4, 6))
        with mp.get_context("spawn").Manager() as manager:
            results = manager.dict()
            mp.spawn(whiten_on_rank, args=(os.fspath(tmp_path / "store"), x, mask, results), nprocs=2)
            got = torch.tensor(results[0] + results[1])
        torch.testing.assert_close(got, whiten(x, mask), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("values", [[1e6, 1e6 + 0.0625, 1e6], [0.1, 0.1 + 7e-9, 0.1], [-3.0, -3.0000002]])
def test_whitening_makes_nothing_of_rounding(values):
    x = torch.tensor(values)
    assert not whiten(x, torch.ones_like(x)).any()
    assert not scale_scores(x, scaling="whiten", running=RunningStd()).any()


class TestGroupScores:
    SCORES = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])

    @pytest.mark.parametrize(
        "estimator,expected",
        [
            ("rloo", [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]),
            ("grpo", [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0, 0, 0]),
            ("dr_grpo", [-2, -1, 3, 0, 0, 0]),
            ("reinforce_baseline", [-2, -1, 3, 0, 0, 0]),
            ("reinforce", [1, 2, 6, 5, 5, 5]),
        ],
    )
    def test_by_hand(self, estimator, expected):
        torch.testing.assert_close(
            group_scores(self.SCORES, estimator=estimator, group_size=3), torch.tensor(expected, dtype=torch.float32)
        )

    @settings(max_examples=50, deadline=None)
    @given(
        st.sampled_from(["rloo", "grpo", "dr_grpo", "reinforce_baseline"]),
        st.integers(2, 6),
        st.integers(1, 4),
        st.integers(0, 10**6),
    )
    def test_every_group_sums_to_zero(self, estimator, group_size, groups, seed):
        scores = torch.randn(groups * group_size, generator=torch.Generator().manual_seed(seed))
        shaped = group_scores(scores, estimator=estimator, group_size=group_size)
        torch.testing.assert_close(shaped.view(groups, -1).sum(1), torch.zeros(groups), atol=1e-4, rtol=0)

    @settings(max_examples=50, deadline=None)
    @given(st.sampled_from(["rloo", "grpo", "dr_grpo", "reinforce_baseline"]), st.integers(2, 9), st.floats(-10, 10))
    def test_equal_scores_give_exactly_zero(self, estimator, group_size, score):
        assert not group_scores(torch.full((group_size,), score), estimator=estimator, group_size=group_size).any()

    NEARLY_EQUAL = (
        [1.0 * 0.0 + 0.5 * 0.0 + 0.2 * 0.8, 0.16 + 1.5e-8],
        [0.1 + 0.2 - 0.3, 0.0, 7.45e-9, -7.45e-9],
        [1e4, 1e4 + 2**-10, 1e4, 1e4 - 2**-10],
        [-3.3333333, -3.3333335, -3.333333],
        [1e-8, 2e-8],
    )

    @pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo", "reinforce_baseline"])
    @pytest.mark.parametrize("scores", NEARLY_EQUAL)
    def test_rounding_gives_exactly_zero(self, estimator, scores):
        scores = torch.tensor(scores, dtype=torch.float64)
        for x in (scores, scores.float()):
            assert not group_scores(x, estimator=estimator, group_size=len(x)).any()
            assert not informative_groups(x, group_size=len(x)).any()
        assert not group_scores(scores + 5, estimator=estimator, group_size=len(scores)).any()

    @settings(max_examples=50, deadline=None)
    @given(st.integers(2, 9), st.integers(0, 10**6), st.floats(-2, 1), st.floats(-5, 5))
    def test_grpo_is_within_a_thousandth_of_the_plain_formula(self, n, seed, scale, offset):
        scores = offset + 10.0**scale * torch.rand(
            n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        spread = scores.std()
        if spread > 1e-3:
            plain = ((scores - scores.mean()) / (spread + 1e-9)).float()
            torch.testing.assert_close(
                group_scores(scores, estimator="grpo", group_size=n), plain, atol=2e-3, rtol=1e-3
            )

    def test_the_tolerance_covers_a_model_of_less_precision(self):
        scores = torch.tensor([1.0, 1.0078125, 1.0, 0.0, 1.0, 0.0])
        assert group_scores(scores, estimator="grpo", group_size=3).count_nonzero() == 6
        shaped = group_scores(scores, estimator="grpo", group_size=3, tolerance=0.02)
        assert not shaped[:3].any() and shaped[3:].count_nonzero() == 3
        mask = torch.ones(6, 4)
        options = {"group_size": 3, "beta": 0.0, "clip": 10.0, "gamma": 1.0, "lam": 1.0, "tolerance": 0.02}
        advantages, *_ = compute_advantages(scores, torch.zeros(6, 4), None, mask, estimator="rloo", **options)
        assert not advantages[:3].any() and advantages[3:].any()

    def test_wrong_groups_are_refused(self):
        with pytest.raises(ConfigError, match="do not split into groups of 4"):
            group_scores(self.SCORES, estimator="rloo", group_size=4)
        with pytest.raises(ConfigError, match="too small for estimator 'grpo'"):
            group_scores(self.SCORES, estimator="grpo", group_size=1)
        with pytest.raises(ConfigError, match="expected: reinforce, reinforce_baseline, rloo, grpo"):
            group_scores(self.SCORES, estimator="gpro", group_size=3)
        assert group_scores(self.SCORES, estimator="reinforce", group_size=1).tolist() == self.SCORES.tolist()


def naive_scores(scores, estimator, n):
    """Group by group, in plain Python."""
    shaped = []
    for start in range(0, len(scores), n):
        group = scores[start : start + n]
        mean = sum(group) / n
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i]
            if estimator == "rloo":
                shaped.append(r - sum(others) / (n - 1))
            elif estimator == "grpo":
                std = (sum((x - mean) ** 2 for x in group) / (n - 1)) ** 0.5
                shaped.append((r - mean) / (std + 1e-9) if max(group) > min(group) else 0.0)
            else:
                shaped.append(r if estimator == "reinforce" else r - mean)
    return shaped


class TestEstimate:
    """The whole way from scores to advantages against loops over answers and tokens, with ragged masks."""

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(["gae", "reinforce", "reinforce_baseline", "rloo", "grpo", "dr_grpo"]),
        st.integers(1, 3),
        st.integers(2, 4),
        st.integers(1, 9),
        st.integers(0, 10**6),
        st.floats(0, 0.5),
        st.floats(0.5, 4),
        st.floats(0.5, 1),
        st.floats(0, 1),
        st.booleans(),
    )
    def test_equals_the_loops(self, estimator, groups, n, length, seed, beta, clip, gamma, lam, white):
        generator = torch.Generator().manual_seed(seed)
        rows = groups * n
        scores = torch.randint(-3, 4, (rows,), generator=generator) * 1.5
        kl, values = (torch.randn(rows, length, generator=generator) for _ in range(2))
        mask = (torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=generator)).float()
        advantages, returns, rewards = compute_advantages(
            scores,
            kl,
            values if estimator == "gae" else None,
            mask,
            estimator=estimator,
            group_size=n,
            beta=beta,
            clip=clip,
            gamma=gamma,
            lam=lam,
        )
        if white:
            advantages = whiten(advantages, mask)

        clipped = [max(-clip, min(clip, r)) for r in scores.tolist()]
        shaped = clipped if estimator == "gae" else naive_scores(clipped, estimator, n)
        expected = [[0.0] * length for _ in range(rows)]
        for b in range(rows):
            tokens = int(mask[b].sum())
            r = [-beta * kl[b, t].item() + (shaped[b] if t == tokens - 1 else 0.0) for t in range(tokens)]
            assert rewards[b, :tokens].tolist() == pytest.approx(r, abs=1e-4)
            v = values[b].tolist()[:tokens] + [0.0]
            for t in range(tokens):
                if estimator == "gae":
                    expected[b][t] = sum(
                        (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(tokens - t)
                    )
                    assert returns[b, t].item() == pytest.approx(expected[b][t] + v[t], abs=1e-4)
                else:
                    expected[b][t] = sum(gamma**k * r[t + k] for k in range(tokens - t))
        if white:
            flat = [expected[b][t] for b in range(rows) for t in range(int(mask[b].sum()))]
            mean = sum(flat) / len(flat)
            std = max(sum((x - mean) ** 2 for x in flat) / len(flat), 1e-8) ** 0.5
            if std < 1e-3:
                return  # rounding decides the direction of a difference that is none
            expected = [
                [(x - mean) / std if mask[b, t] else 0.0 for t, x in enumerate(row)] for b, row in enumerate(expected)
            ]
        torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-3, rtol=1e-3)
