"""Values that no sound set holds are named where a batch reads them, and open sets keep no file open."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mrlhf.data.batching import BatchPlan
from mrlhf.data.blend import Blend
from mrlhf.data.indexed import FORMAT_VERSION, PackedDataset
from mrlhf.data.loader import Loader
from mrlhf.data.writer import OutputSet
from mrlhf.errors import DataError

VOCAB = 50


def write(prefix: Path, *, task: str = "sft", dtype: str = "uint16") -> PackedDataset:
    """Two documents of two samples (pairs, prompts: one a document) of three tokens."""
    each = 1 if task == "prompts" else 2
    with OutputSet(prefix) as output:
        output.indexed("", np.dtype(dtype)).add_documents(np.arange(12), [3] * 4, [each] * (4 // each))
        if task != "prompts":
            output.indexed("_loss_mask", np.dtype("uint8")).add_documents(np.array([0, 1, 1] * 4), [3] * 4, [2, 2])
        if task == "preference":
            output.indexed("_margin", np.dtype("float32")).add_documents(np.ones(2), [1, 1], [1, 1])
        if task == "prompts":
            output.stream("_labels.jsonl").write(b"1\n2\n3\n4\n")
        output.commit({"format": FORMAT_VERSION, "task": task, "num_samples": 4, "num_packs": 4 // each,
                       "vocab_size": VOCAB})  # fmt: skip
    return PackedDataset.open(prefix)


def overwrite(path: Path, place: int, value: np.generic) -> None:
    with open(path, "r+b") as file:
        file.seek(place * value.itemsize)
        file.write(value.tobytes())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("task", "part", "place", "value", "what", "expected"),
    [
        ("sft", "", 7, np.uint16(60000), "token id 60000 at token 1 of sample 2", "0 to 49"),
        ("sft", "", 7, np.uint16(VOCAB), "token id 50 at token 1 of sample 2", "0 to 49"),
        ("pretrain", "", 11, np.int32(-1), "token id -1 at token 2 of sample 3", "0 to 49"),
        ("preference", "", 6, np.int32(1 << 30), "token id 1073741824 at token 0 of sample 2", "0 to 49"),
        ("sft", "_loss_mask", 8, np.uint8(77), "mask value 77 at token 2 of sample 2", "0 or 1"),
        ("preference", "_loss_mask", 8, np.uint8(2), "mask value 2 at token 2 of sample 2", "0 or 1"),
        ("preference", "_margin", 1, np.float32("nan"), "margin nan of pair 1", "finite"),
        ("preference", "_margin", 1, np.float32("-inf"), "margin -inf of pair 1", "finite"),
    ],
)
def test_a_damaged_value_is_named_by_its_batch(task: str, part: str, place: int, value: np.generic, what: str,
                                               expected: str, packing: bool, tmp_path: Path) -> None:  # fmt: skip
    dtype = value.dtype.name if part == "" else "uint16"
    sound = write(tmp_path / "sound", task=task, dtype=dtype)
    damaged = write(tmp_path / "damaged", task=task, dtype=dtype)
    overwrite(tmp_path / f"damaged{part}.bin", place, value)
    loader = Loader(Blend([sound, damaged]), BatchPlan(packing=packing))
    rows = range(loader.num_rows)
    half = len(rows) // 2

    def read(row: int) -> None:
        (batch,) = loader.micro_batches([row])
        if task == "preference":
            assert loader.margins(batch) is not None

    for row in rows[:half]:
        read(row)
    with pytest.raises(DataError) as caught:
        for row in rows[half:]:
            read(row)
    assert what in caught.value.what and expected in (caught.value.expected or "")
    assert caught.value.where == f"{tmp_path}/damaged{part}.bin"


def test_damaged_prompts_and_labels(tmp_path: Path) -> None:
    data = write(tmp_path / "p", task="prompts")
    overwrite(tmp_path / "p.bin", 4, np.uint16(999))
    assert data.sample(0)[1].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="token id 999 at token 1 of sample 1"):
        data.sample(1)
    (tmp_path / "p_labels.jsonl").write_bytes(b"1\n2\n\xff\n4\n")
    with pytest.raises(DataError, match="not JSON") as caught:
        data.label(0)
    assert caught.value.where == f"{tmp_path}/p_labels.jsonl:3"


def test_open_sets_keep_no_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened = [write(tmp_path / str(i), task="preference") for i in range(8)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert [data.sample(3)[1].tolist() for data in opened] == [[9, 10, 11]] * 8
    with pytest.raises(ValueError, match="read-only"):
        opened[0].lengths[0] = 5
    view = opened[0].margins
    opened.clear()
    assert view is not None and view.tolist() == [1, 1], "a view outlives its reader"
