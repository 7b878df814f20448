"""Data sets seen as one: every sample comes from its own source under its own number,
and what does not fit is said at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrlhf.data.blend import Blend, mismatches, names_of, rows_of, sources_of
from mrlhf.data.indexed import FORMAT_VERSION, PackedDataset
from mrlhf.data.writer import OutputSet

Make = Callable[..., PackedDataset]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A set of packs given as lists of samples (lists of ids), trained from the second token on."""

    def write(
        name: str, packs: list[list[list[int]]], *, task: str = "sft", margins: bool = False, **meta: Any
    ) -> PackedDataset:
        with OutputSet(tmp_path / name) as output:
            ids, mask = output.indexed("", np.dtype("uint16")), output.indexed("_loss_mask", np.dtype("uint8"))
            margin = output.indexed("_margin", np.dtype("float32")) if margins else None
            for samples in packs:
                lengths = [len(s) for s in samples]
                ids.add_documents(np.concatenate(samples), lengths, [len(lengths)])
                mask.add_documents(np.concatenate([[0] + [1] * (n - 1) for n in lengths]), lengths, [len(lengths)])
                if margin is not None:
                    margin.add_documents(
                        np.array([float(s[0]) for s in samples[::2]]), [1] * (len(samples) // 2), [len(samples) // 2]
                    )
            values = {
                "format": FORMAT_VERSION,
                "task": task,
                "num_samples": sum(map(len, packs)),
                "num_packs": len(packs),
                "seq_length": 16,
                "tokenizer": "t",
                "tokenizer_fingerprint": "a" * 64,
            }
            output.commit(values | meta)
        return PackedDataset.open(tmp_path / name)

    return write


def test_samples_and_packs_are_numbered_through(make: Make) -> None:
    a, b, c = (
        make("a", [[[1, 1], [2, 2, 2]], [[3, 3]]]),
        make("b", [[[4, 4]]]),
        make("c", [[[5, 5]], [[6, 6], [7, 7], [8, 8]]]),
    )
    blend = Blend([a, b, c])
    assert (blend.num_samples, blend.num_packs, blend.num_tokens, blend.max_length, blend.task) == (8, 5, 17, 3, "sft")
    samples = [blend.sample(i) for i in range(8)]
    assert [i for i, _, _ in samples] == list(range(8)) and [int(t[0]) for _, t, _ in samples] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert samples[1][1].tolist() == [2, 2, 2] and samples[1][2].tolist() == [0, 1, 1]
    packs = [[(i, int(t[0])) for i, t, _ in blend.pack(row)] for row in range(5)]
    assert packs == [[(0, 1), (1, 2)], [(2, 3)], [(3, 4)], [(4, 5)], [(5, 6), (6, 7), (7, 8)]]
    assert rows_of(blend, packing=True) == 5 and rows_of(blend, packing=False) == 8
    assert sources_of(blend) == [a, b, c] and sources_of(a) == [a]
    assert blend.identity == Blend([a, b, c]).identity != Blend([a, c, b]).identity


def test_pairs_and_margins(make: Make) -> None:
    pair = [[10, 1], [11, 1]]
    a = make("a", [pair], task="preference", margins=True)
    b = make("b", [[[20, 1], [21, 1], [30, 1], [31, 1]]], task="preference", margins=True)
    blend = Blend([a, b])
    assert [blend.margin(p) for p in range(3)] == [10.0, 20.0, 30.0] and rows_of(blend, packing=False) == 3
    assert not mismatches([a, b], key="data.train")


def test_every_mismatch_at_once(make: Make) -> None:
    rows = [[[1, 1], [2, 2]]]
    a = make("a", rows, task="preference", margins=True)
    b = make("b", rows, task="preference", seq_length=32, tokenizer="u", tokenizer_fingerprint="b" * 64)
    c = make("c", rows, tokenizer="copy of t")
    found = [str(e) for e in mismatches([a, b, c], key="data.train")]
    assert [text.splitlines()[0] for text in found] == [
        f"data.train: the sources differ in seq_length: {a.prefix} has 16, {b.prefix} has 32",
        (
            f"data.train: the sources differ in tokenizer: {a.prefix} has t (fingerprint aaaaaaaaaaaa), "
            f"{b.prefix} has u (fingerprint bbbbbbbbbbbb)"
        ),
        f"data.train: the sources differ in margins: {a.prefix} has margins, {b.prefix} has none",
        f"data.train: the sources differ in task: {a.prefix} has preference, {c.prefix} has sft",
    ]


def test_names() -> None:
    assert names_of(["x/chat", "y/code"]) == ["chat", "code"]
    assert names_of(["x/chat", "y/chat", "z/code"]) == ["x/chat", "y/chat", "code"]
