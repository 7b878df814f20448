"""Files of Megatron-LM's own writer: nothing lost, nothing predicted across documents, every integer type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mrlhf.commands import data as command
from mrlhf.data.indexed import PackedDataset
from mrlhf.data.megatron_text import MegatronText, is_megatron
from mrlhf.errors import DataError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """By megatron-core's IndexedDatasetBuilder; a document is a list of sequences,
    as tools/preprocess_data.py adds them.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def make(documents: list[list[list[int]]], dtype: type = np.int32, name: str = "x_text_document") -> str:
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for sequences in documents:
            builder.add_document(
                torch.tensor([t for s in sequences for t in s], dtype=torch.int64), [len(s) for s in sequences]
            )
        builder.finalize(f"{prefix}.idx")
        return prefix

    return make


def random_documents(seed: int, *, sentences: bool, empties: bool) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    documents: list[list[list[int]]] = []
    for _ in range(int(rng.integers(1, 30))):
        pieces = int(rng.integers(0 if empties else 1, 4)) if sentences else int(rng.random() > 0.3) if empties else 1
        documents.append([rng.integers(0, 100, int(rng.integers(1, 20))).tolist() for _ in range(pieces)])
    return documents if any(documents) else [[[1, 2]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize(("sentences", "empties"), [(False, False), (True, False), (False, True), (True, True)])
def test_nothing_is_lost_and_documents_stay_apart(dtype: type, sentences: bool, empties: bool, write: Write) -> None:
    for seed, length in ((1, 2), (2, 7), (3, 16), (4, 1000)):
        documents = random_documents(seed, sentences=sentences, empties=empties)
        data = MegatronText(write(documents, dtype), seq_length=length, vocab_size=100)
        texts = [text for text in ([t for s in d for t in s] for d in documents) if text]
        stream = [(d, t) for d, text in enumerate(texts) for t in text]
        packs = [data.pack(row) for row in range(data.num_packs)]
        assert [len(stream[at : at + length]) for at in range(0, len(stream), length)] == [
            sum(len(t) for _, t, _ in p) for p in packs
        ]
        samples = [s for pack in packs for s in pack]
        assert [i for i, _, _ in samples] == list(range(data.num_samples)), "numbered through"
        assert [t for _, tokens, _ in samples for t in tokens.tolist()] == [t for _, t in stream], (
            "every token once, in order"
        )
        assert all(
            mask.tolist() == [0] + [1] * (len(tokens) - 1) and tokens.dtype == np.int64 for _, tokens, mask in samples
        )
        at = 0
        for _, tokens, _ in samples:
            assert len({d for d, _ in stream[at : at + len(tokens)]}) == 1, "one document a sample"
            at += len(tokens)
        for i in range(data.num_samples):
            number, tokens, _ = data.sample(i)
            assert number == i and np.array_equal(tokens, samples[i][1])
        assert data.num_tokens == len(stream) and data.max_length == min(length, max(map(len, texts)))


def test_ids_beyond_the_vocabulary(write: Write) -> None:
    prefix = write([[[1, 2, 3]], [[4, 99]]])
    assert MegatronText(prefix, seq_length=4, vocab_size=100).num_packs == 2
    with pytest.raises(DataError, match="token id 99") as raised:
        MegatronText(prefix, seq_length=4, vocab_size=99)
    assert raised.value.expected == "ids of the model's vocabulary, 0 to 98"
    many = write([[[1] * 9]] * 300 + [[[500]]] + [[[1] * 9]] * 300, name="many")
    data = MegatronText(many, seq_length=9, vocab_size=100)  # not among the packs that are looked at before a run
    with pytest.raises(DataError, match="token id 500"):
        [data.pack(row) for row in range(data.num_packs)]


def test_floats_hold_no_ids(write: Write) -> None:
    with pytest.raises(DataError, match="data type code 7"):
        MegatronText(write([[[1, 2]]], np.float32), seq_length=4, vocab_size=100)


def test_what_is_taken_for_megatrons(write: Write, tmp_path: Path) -> None:
    prefix = write([[[1, 2]]])
    assert is_megatron(prefix) and not is_megatron(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="PREFIX.json is missing") as raised:
        PackedDataset.open(prefix)
    assert "serves pretraining alone" in str(raised.value)
    (tmp_path / ".x.work").mkdir()
    assert not is_megatron(prefix), "a set of ours whose writer was killed"


def test_damage(write: Write) -> None:
    prefix = write([[[1, 2, 3]], [[4, 5]]])
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    for at in range(34, len(whole) - 24):  # lengths and offsets; a document's border alone cannot be checked
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError):
            MegatronText(prefix, seq_length=4, vocab_size=100)
    path.write_bytes(whole)
    Path(f"{prefix}.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="truncated"):
        MegatronText(prefix, seq_length=4, vocab_size=100)


def test_inspection(write: Write, bpe_dir: str, load: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    ids = load(bpe_dir)("the quick brown fox")["input_ids"]
    prefix = write([[ids], [], [ids[:2]]])
    assert command.main([prefix, "--samples", "2", "--check", "--tokenizer", bpe_dir]) == 0
    text = capsys.readouterr().out
    assert "3 documents (1 empty)" in text and text.count("--- document") == 2 and "nothing wrong was found" in text
    assert "quick brown fox]]" in text.replace("[[", "")
    with pytest.raises(DataError, match="id 5000 at token 1"):
        command.main([write([[[1, 5000]]], name="wrong"), "--check", "--tokenizer", bpe_dir])
