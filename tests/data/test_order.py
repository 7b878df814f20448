"""The order of a blend: exact shares at every position, every row once an epoch, the same from any position on."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.data.order import Interleave, Mix, Order, feistel, permute

counts = st.lists(st.integers(1, 60), min_size=1, max_size=12) | st.lists(
    st.integers(1, 10**12), min_size=2, max_size=5
)


@settings(max_examples=200, deadline=None)
@given(counts)
def test_less_than_one_row_off_the_share_at_every_position(shares: list[int]) -> None:
    interleave, total, taken = Interleave(shares), sum(shares), [0] * len(shares)
    for position, source in enumerate(interleave.take(400).tolist(), start=1):
        taken[source] += 1
        assert all(abs(n * total - c * position) < total for n, c in zip(taken, shares, strict=True)), position
        if position % total == 0:
            assert taken == [c * position // total for c in shares]
    assert interleave.taken == taken


@settings(max_examples=100, deadline=None)
@given(counts, st.integers(0, 400), st.integers(0, 400))
def test_the_same_from_any_position(shares: list[int], start: int, other: int) -> None:
    whole = Interleave(shares).take(450)
    replayed, told = Interleave(shares), Interleave(shares)
    replayed.seek(other)
    replayed.seek(start)
    told.seek(start, np.bincount(whole[:start], minlength=len(shares)).tolist())
    assert replayed.take(50).tolist() == told.take(50).tolist() == whole[start : start + 50].tolist()


@pytest.mark.parametrize("taken", [[3, 3, 1], [4, 2, 0], [3, 3], [6, 0, 0], [2, 2, 2]])
def test_counts_that_cannot_be_are_refused(taken: list[int]) -> None:
    """After 6 rows of shares 3 : 2 : 1 only [3, 2, 1] is possible."""
    with pytest.raises(ValueError, match="position 6"):
        Interleave([3, 2, 1]).seek(6, taken)


@given(st.integers(1, 5000), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_feistel_is_a_bijection(n: int, seed: int) -> None:
    keys = np.random.SeedSequence(seed).generate_state(6, np.uint64)
    assert np.array_equal(np.sort(feistel(np.arange(n), n, keys)), np.arange(n))


def test_large_permutations_are_uniform_and_neighbours_part() -> None:
    """2,000 keys of a set too large to be listed: where a row goes has no favourite tenth;
    nothing stays near its neighbour.
    """
    n, picked = 3_000_017, np.array([0, 1, 2, 1_500_000, 3_000_016])
    places = np.stack([permute(picked, n, seed=1, source=0, epoch=e) for e in range(2000)])
    for row in places.T:
        tenths = np.bincount(row * 10 // n, minlength=10)
        assert ((tenths - 200) ** 2 / 200).sum() < 33.7  # chi-square, 9 degrees of freedom: beyond it once in 10,000
    assert abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1]) < 0.09  # four standard errors
    listed = permute(np.arange(1000), n, seed=1, source=0, epoch=0)
    assert len(set(listed.tolist())) == 1000 and (np.abs(np.diff(listed)) == 1).sum() == 0
    assert not np.array_equal(listed, permute(np.arange(1000), n, seed=2, source=0, epoch=0))
    assert not np.array_equal(listed, permute(np.arange(1000), n, seed=1, source=1, epoch=0))


number = st.sampled_from([None, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), number), min_size=1, max_size=5),
    st.integers(1, 16),
    st.integers(0, 9),
    st.booleans(),
)
def test_epochs_are_exact(sources: list[tuple[int, float | None]], batch: int, seed: int, shuffle: bool) -> None:
    """Without weights every source gives epochs x rows, each row as often as any other up to the unfinished pass."""
    rows = [n for n, _ in sources]
    mix = Mix.from_weights(rows, [None] * len(rows), [e for _, e in sources])
    order = Order(mix, global_batch_size=batch, num_epochs=1, max_steps=None, seed=seed, shuffle=shuffle)
    met = [row for step in range(1, order.total_steps + 1) for row in order.rows(step)]
    real = [row for row in met if row >= 0]
    assert met == real + [-1] * (len(met) - len(real)) and len(met) - len(real) < batch
    assert order.consumed(order.total_steps) == list(mix.counts)
    firsts = np.concatenate([[0], np.cumsum(rows)])
    for first, n, (_, epochs) in zip(firsts.tolist(), rows, sources, strict=False):
        own = [row - first for row in real if first <= row < first + n]
        assert len(own) == max(1, round(n * Fraction(str(epochs or 1))))
        passes = [own[at : at + n] for at in range(0, len(own), n)]
        assert all(len(set(p)) == len(p) for p in passes)
        if not shuffle:
            assert own == [k % n for k in range(len(own))]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.3, 1.0, 2.0, 7.0])), min_size=2, max_size=6),
    st.integers(1, 12),
    st.data(),
)
def test_weights_are_shares_and_the_order_goes_on_from_any_step(sources: list, batch: int, data: st.DataObject) -> None:
    rows, weights = [n for n, _ in sources], [w for _, w in sources]
    mix = Mix.from_weights(rows, weights, [None] * len(rows))
    assert mix.pass_rows == sum(rows)

    def make() -> Order:
        return Order(mix, global_batch_size=batch, num_epochs=2, max_steps=None, seed=3, shuffle=True)

    whole = make()
    steps = [whole.rows(step) for step in range(1, whole.total_steps + 1)]
    shares = [Fraction(str(w)) / sum(Fraction(str(v)) for v in weights) for w in weights]
    counted = make()
    for step in range(1, whole.total_steps + 1):
        position = whole.position(step)
        assert all(abs(n - position * s) < 1 for n, s in zip(counted.consumed(step), shares, strict=True))
    done = data.draw(st.integers(0, whole.total_steps))
    counted.consumed(done)
    resumed, blind = make(), make()
    resumed.resume_after_step(done, counted.consumed(done))
    for order in (resumed, blind):
        assert [order.rows(step) for step in range(done + 1, whole.total_steps + 1)] == steps[done:]


def test_weights_with_epochs_end_where_the_first_limited_source_does() -> None:
    """Shares 3 : 1, at most two passes over the 30 rows of the first: 60 of it and 20 of the other."""
    mix = Mix.from_weights([30, 1000], [0.75, 0.25], [2.0, None])
    order = Order(mix, global_batch_size=8, num_epochs=1, max_steps=None, seed=1, shuffle=True)
    rows = Counter(row for step in range(1, order.total_steps + 1) for row in order.rows(step) if row >= 0)
    assert mix.pass_rows == 80 and order.consumed(order.total_steps) == [60, 20]
    assert all(rows[row] == 2 for row in range(30)) and sum(n for row, n in rows.items() if row >= 30) == 20
    assert Mix.from_weights([30, 10], [0.75, 0.25], [2.0, 1.0]).pass_rows == 40, "the second ends first"


def test_max_steps_goes_on_beyond_a_pass() -> None:
    order = Order(
        Mix.from_weights([3, 5], [None] * 2, [None] * 2),
        global_batch_size=4,
        num_epochs=1,
        max_steps=6,
        seed=1,
        shuffle=True,
    )
    rows = Counter(row for step in range(1, 7) for row in order.rows(step))
    assert all(rows[row] == 3 for row in range(8)) and order.epoch(6) == 3.0


def test_a_look_ahead_moves_nothing() -> None:
    looking, other = (
        Order(
            Mix.from_weights([50, 30], [0.7, 0.3], [None, None]),
            global_batch_size=7,
            num_epochs=3,
            max_steps=None,
            seed=5,
            shuffle=True,
        )
        for _ in range(2)
    )
    for start in range(0, 200, 8):
        assert looking.peek(start, start + 8) == other.span(start, start + 8)
        assert looking._interleave.position == start
        assert looking.span(start, start + 8) == looking.peek(start, start + 8)
        looking.taken_at(start + 8)


def test_a_single_source_keeps_the_order_it_always_had() -> None:
    """A run that began with an earlier version goes on with the same rows."""
    order = Order(Mix.single(7), global_batch_size=7, num_epochs=2, max_steps=None, seed=3, shuffle=True)
    for epoch in (0, 1):
        drawn = np.random.Generator(np.random.Philox(key=[3, epoch])).permutation(7)
        assert order.rows(epoch + 1) == drawn.tolist()


def test_a_hundred_million_rows_take_no_memory() -> None:
    tracemalloc.start()
    order = Order(
        Mix.from_weights([50_000_003, 29_999_981, 20_000_017], [0.5, 0.2, 0.3], [None] * 3),
        global_batch_size=512,
        num_epochs=1,
        max_steps=None,
        seed=1,
        shuffle=True,
    )
    first = order.rows(1)
    order.resume_after_step(100_000, [round(100_000 * 512 * s) for s in (0.5, 0.2, 0.3)])
    late = order.rows(100_001)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 << 20, "a permutation of them would be 800 MB"
    assert len(set(first + late)) == 1024 and all(0 <= row < 100_000_001 for row in first + late)
