"""Micro-batches number by number, and the order of a run:
nothing lost, nothing twice, the same for any number of ranks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.data.batching import BatchPlan
from mrlhf.data.blend import Blend, rows_of
from mrlhf.data.indexed import FORMAT_VERSION, PackedDataset
from mrlhf.data.loader import Loader, MicroBatch, Sample, collate
from mrlhf.data.order import Mix, Order
from mrlhf.data.writer import OutputSet

A = Sample(np.array([5, 6, 7]), np.array([1, 1, 1], np.uint8), 4)
B = Sample(np.array([8, 9]), np.array([0, 1], np.uint8), 2)


def dataset(prefix: Path, packs: list[list[list[int]]], *, task: str = "sft", margins: bool = False) -> PackedDataset:
    """Samples of one token repeated, so that a row is known by its tokens; trained from the second token on."""
    with OutputSet(prefix) as output:
        ids, mask = output.indexed("", np.dtype("uint16")), output.indexed("_loss_mask", np.dtype("uint8"))
        margin = output.indexed("_margin", np.dtype("float32")) if margins else None
        for samples in packs:
            lengths = [len(s) for s in samples]
            ids.add_documents(np.concatenate(samples), lengths, [len(lengths)])
            mask.add_documents(np.concatenate([[0] + [1] * (n - 1) for n in lengths]), lengths, [len(lengths)])
            if margin is not None:
                margin.add_documents(
                    np.array([s[0] / 2 for s in samples[::2]]), [1] * (len(samples) // 2), [len(samples) // 2]
                )
        count = sum(map(len, packs))
        output.commit({"format": FORMAT_VERSION, "task": task, "num_samples": count, "num_packs": len(packs)})
    return PackedDataset.open(prefix)


@pytest.fixture
def numbered(tmp_path: Path) -> PackedDataset:
    """Ten packs of one to three samples; the samples are numbered in order from 0."""
    number = iter(range(100))
    return dataset(tmp_path / "d", [[[next(number)] * (2 + i % 4) for i in range(1 + p % 3)] for p in range(10)])


@pytest.fixture
def pairs(tmp_path: Path) -> PackedDataset:
    """Packs of one and two pairs: chosen 10, 12, 14, rejected 11, 13, 15."""
    return dataset(
        tmp_path / "p",
        [[[10] * 3, [11] * 2], [[12] * 2, [13] * 4, [14] * 5, [15] * 2]],
        task="preference",
        margins=True,
    )


def equal(batch: MicroBatch, **expected: object) -> None:
    for name, value in expected.items():
        found = getattr(batch, name)
        assert (found.tolist() if isinstance(found, torch.Tensor) else found) == value, name


def test_packed() -> None:
    equal(
        collate([A, B], packing=True),
        tokens_BT=[[5, 6, 7, 8, 9]],
        targets_BT=[[6, 7, 0, 9, 0]],
        mask_BT=[[1, 1, 0, 1, 0]],  # 7 does not predict 8
        segments_BT=[[0, 0, 0, 1, 1]],
        last_N=[2, 4],
        weights_N=[1, 1],
        index_N=[4, 2],
        lengths=(3, 2),
        positions_BT=[[0, 1, 2, 0, 1]],
        bounds=(0, 3, 5),
        cu_seqlens=[0, 3, 5],
        max_seqlen=3,
    )


def test_padding_of_a_pack_is_a_sample_of_its_own_to_the_attention() -> None:
    equal(
        collate([A, B], packing=True, pad_multiple=4),
        tokens_BT=[[5, 6, 7, 8, 9, 0, 0, 0]],
        mask_BT=[[1, 1, 0, 1, 0, 0, 0, 0]],
        segments_BT=[[0, 0, 0, 1, 1, 2, 2, 2]],
        last_N=[2, 4],
        positions_BT=[[0, 1, 2, 0, 1, 0, 0, 0]],
        bounds=(0, 3, 5, 8),
        cu_seqlens=[0, 3, 5, 8],
        max_seqlen=3,
    )


def test_padded_right() -> None:
    equal(
        collate([A, B], packing=False, pad_multiple=2),
        tokens_BT=[[5, 6, 7, 0], [8, 9, 0, 0]],
        targets_BT=[[6, 7, 0, 0], [9, 0, 0, 0]],
        mask_BT=[[1, 1, 0, 0], [1, 0, 0, 0]],
        segments_BT=[[0, 0, 0, 2], [1, 1, 2, 2]],
        last_N=[2, 5],
        positions_BT=[[0, 1, 2, 0], [0, 1, 0, 0]],
        bounds=(0, 4, 8),  # causal attention never looks right
        cu_seqlens=[0, 4, 8],
        max_seqlen=4,
    )


def test_padded_left() -> None:
    equal(
        collate([A, B], packing=False, padding_side="left"),
        tokens_BT=[[5, 6, 7], [0, 8, 9]],
        targets_BT=[[6, 7, 0], [0, 9, 0]],
        mask_BT=[[1, 1, 0], [0, 1, 0]],
        segments_BT=[[0, 0, 0], [2, 1, 1]],
        last_N=[2, 5],
        positions_BT=[[0, 1, 2], [0, 0, 1]],
        bounds=(0, 3, 4, 6),
        cu_seqlens=[0, 3, 4, 6],
        max_seqlen=3,
    )


@pytest.mark.parametrize(("packing", "side"), [(True, "right"), (False, "right"), (False, "left")])
def test_per_sample_views(packing: bool, side: str) -> None:
    batch = collate([A, B], packing=packing, pad_multiple=4, padding_side=side)
    tokens = batch.tokens_BT
    assert batch.sum_N(tokens).tolist() == [18, 17]
    assert batch.last(tokens).tolist() == [7, 9]
    assert [s.tolist() for s in batch.per_sample(tokens)] == [[5, 6, 7], [8, 9]]


def test_fillers_are_read_and_count_nowhere(numbered: PackedDataset) -> None:
    loader = Loader(numbered, BatchPlan(packing=True, micro_batch_size=2, dp_rank=0, dp_size=1))
    (batch,) = loader.micro_batches([3, -1])
    assert batch.weights_N.tolist() == [1, 0]
    assert batch.sum_N(batch.mask_BT)[1] == 0 < batch.sum_N(batch.mask_BT)[0]


def test_pairs_packed_and_padded(pairs: PackedDataset) -> None:
    packed = Loader(pairs, BatchPlan(packing=True, micro_batch_size=2, dp_rank=0, dp_size=1))
    padded = Loader(pairs, BatchPlan(packing=False, micro_batch_size=3, dp_rank=0, dp_size=1))
    assert (packed.num_rows, padded.num_rows) == (2, 3)
    (row,), (rows,) = packed.micro_batches([0, 1]), padded.micro_batches([0, 1, 2])
    assert row.tokens_BT.shape[0] == 1 and rows.tokens_BT.shape == (6, 5)
    assert rows.tokens_BT[:3, 0].tolist() == [10, 12, 14], "all chosen first"
    for loader, batch in ((packed, row), (padded, rows)):
        chosen, rejected = loader.pairs(batch)
        first = batch.last(batch.tokens_BT)
        assert (first[chosen].tolist(), first[rejected].tolist()) == ([10, 12, 14], [11, 13, 15])
        margins = loader.margins(batch)
        assert margins is not None and margins.tolist() == [5, 6, 7]


def test_whole_set_in_order(numbered: PackedDataset) -> None:
    for dp in (1, 2, 4):
        loaders = [
            Loader(numbered, BatchPlan(packing=False, micro_batch_size=3, dp_rank=r, dp_size=dp)) for r in range(dp)
        ]
        seen = [
            i
            for rows in loaders[0].in_order()
            for loader in loaders
            for b in loader.micro_batches(rows)
            for i, w in zip(b.index_N.tolist(), b.weights_N.tolist(), strict=True)
            if w
        ]
        assert seen == list(range(numbered.num_samples))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_ranks_share_a_step_whatever_their_number(numbered: PackedDataset, packing: bool, micro: int) -> None:
    def step(dp: int, rows: list[int]) -> Counter[int]:
        loaders = [
            Loader(numbered, BatchPlan(packing=packing, micro_batch_size=micro, dp_rank=r, dp_size=dp))
            for r in range(dp)
        ]
        return Counter(i for loader in loaders for batch in loader.micro_batches(rows) for i in batch.index_N.tolist())

    num_rows = Loader(numbered, BatchPlan(packing=packing, micro_batch_size=1, dp_rank=0, dp_size=1)).num_rows
    order = Order(Mix.single(num_rows), global_batch_size=8, num_epochs=2, max_steps=None, seed=3, shuffle=True)
    for k in range(1, order.total_steps + 1):
        alone = step(1, order.rows(k))
        assert alone == step(2, order.rows(k)) == step(4, order.rows(k))


@pytest.mark.parametrize("packing", [True, False])
def test_the_ranks_share_a_step_of_a_blend(numbered: PackedDataset, tmp_path: Path, packing: bool) -> None:
    """The same samples under 1, 2 and 4 ranks, each with its own tokens, and every row of both sources once a pass."""
    other = dataset(tmp_path / "o", [[[200 + p] * 3] for p in range(7)])
    blend = Blend([numbered, other])
    rows = [rows_of(source, packing=packing) for source in blend.sources]
    order = Order(
        Mix.from_weights(rows, [None] * 2, [None] * 2),
        global_batch_size=4,
        num_epochs=1,
        max_steps=None,
        seed=3,
        shuffle=True,
    )
    met: list[int] = []
    for k in range(1, order.total_steps + 1):
        found = []
        for dp in (1, 2, 4):
            loaders = [
                Loader(blend, BatchPlan(packing=packing, micro_batch_size=1, dp_rank=r, dp_size=dp)) for r in range(dp)
            ]
            batches = [batch for loader in loaders for batch in loader.micro_batches(order.rows(k))]
            real = [b for b in batches if b.weights_N.all()]
            found.append(
                Counter(
                    (i, int(t[0]))
                    for b in real
                    for i, t in zip(b.index_N.tolist(), b.per_sample(b.tokens_BT), strict=True)
                )
            )
        assert found[0] == found[1] == found[2]
        met += [i for (i, token), n in found[0].items() for _ in range(n)]
        assert all(
            token == (i if i < numbered.num_samples else 200 + i - numbered.num_samples) for i, token in found[0]
        )
    assert sorted(met) == list(range(numbered.num_samples + 7))


orders = st.fixed_dictionaries(
    {
        "num_rows": st.integers(1, 60),
        "global_batch_size": st.integers(1, 16),
        "num_epochs": st.sampled_from([0.1, 0.5, 1, 1.5, 2, 3]),
        "max_steps": st.one_of(st.none(), st.integers(1, 20)),
        "seed": st.integers(0, 5),
        "shuffle": st.booleans(),
    }
)


def single(options: dict) -> Order:
    return Order(Mix.single(options["num_rows"]), **{k: v for k, v in options.items() if k != "num_rows"})


@settings(max_examples=200, deadline=None)
@given(orders)
def test_every_row_once_an_epoch(options: dict) -> None:
    order, n = single(options), options["num_rows"]
    rows = [row for step in range(1, order.total_steps + 1) for row in order.rows(step)]
    assert len(rows) == order.total_steps * options["global_batch_size"]
    real = [row for row in rows if row >= 0]
    assert rows == real + [-1] * (len(rows) - len(real)), "fillers stand at the very end"
    assert len(rows) - len(real) < options["global_batch_size"]
    epochs = [real[at : at + n] for at in range(0, len(real), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs if len(epoch) == n)
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    if options["max_steps"] is None:
        assert len(real) == max(1, round(n * options["num_epochs"]))
    else:
        assert order.total_steps == options["max_steps"]


@settings(max_examples=100, deadline=None)
@given(orders, st.data())
def test_a_resumed_run_meets_the_rows_of_the_whole_one(options: dict, data: st.DataObject) -> None:
    whole = single(options)
    rows = [whole.rows(step) for step in range(1, whole.total_steps + 1)]
    done = data.draw(st.integers(0, whole.total_steps))
    resumed = single(options)
    assert [resumed.rows(step) for step in range(done + 1, resumed.total_steps + 1)] == rows[done:]


def test_epochs_differ_and_seeds_differ() -> None:
    def epochs(seed: int) -> tuple[list[int], list[int]]:
        order = Order(Mix.single(50), global_batch_size=50, num_epochs=2, max_steps=None, seed=seed, shuffle=True)
        return order.rows(1), order.rows(2)

    first, second = epochs(1)
    assert first != second and first != epochs(2)[0] and first == epochs(1)[0] and first != sorted(first)


def test_part_of_an_epoch_and_max_steps() -> None:
    common = {"global_batch_size": 4, "seed": 1, "shuffle": False}
    half = Order(Mix.single(10), num_epochs=0.5, max_steps=None, **common)
    assert [half.rows(s) for s in (1, 2)] == [[0, 1, 2, 3], [4, -1, -1, -1]] and half.total_steps == 2
    assert (half.epoch(1), half.epoch(2)) == (0.4, 0.5)
    longer = Order(Mix.single(10), num_epochs=1, max_steps=4, **common)
    assert [longer.rows(s) for s in (3, 4)] == [[8, 9, 0, 1], [2, 3, 4, 5]], (
        "max_steps beyond the epochs goes on into the next"
    )
    assert longer.epoch(4) == 1.6
    shorter = Order(Mix.single(10), num_epochs=1, max_steps=2, **common)
    assert shorter.total_steps == 2 and shorter.rows(2) == [4, 5, 6, 7]
