"""Pretraining data in files of Megatron-LM's own tools/preprocess_data.py (`..._text_document.bin/.idx`).

A document is one text. The files hold no mask, no PREFIX.json and no name of the tokenizer. With L = data.seq_length,
pack r is the tokens [r L, (r + 1) L) of the .bin, documents in file order; the last pack may be shorter. A new sample
begins with each document and with each pack, so a document that crosses the end of a pack continues in another sample.
Every token stands in exactly one sample, packs are full, and no sample is longer than L. No token is predicted from
another document: the first token of a sample is not trained, the others are.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mrlhf.data.indexed import IndexedReader
from mrlhf.errors import DataError

_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16")
_CHUNK = 1 << 20
_PROBES = 64  # packs whose ids are checked before a run


def is_megatron(prefix: str) -> bool:
    """Whether PREFIX is a .bin/.idx pair alone, and no unfinished set of our tools/preprocess_data.py."""
    path = Path(prefix)
    ours = Path(f"{prefix}.json").exists() or any(path.parent.glob(f"{path.name}_loss_mask.*"))
    jobs = [work.name[1 : -len(".work")] for work in path.parent.glob(".*.work")]
    unfinished = any(path.name == job or path.name.startswith(f"{job}_") for job in jobs)
    return all(Path(prefix + end).is_file() for end in (".bin", ".idx")) and not ours and not unfinished


class MegatronText:
    """The data set that the module describes (a Dataset of blend.py).

    Opening reads the index once in chunks, and the ids of a few packs. Memory: 8 bytes for each document that begins
    exactly where a pack does, and 8 for each document where some are empty.
    Raises DataError for a damaged index, a data type that holds no ids, and, at opening or reading, an id outside
    [0, vocab_size).
    """

    task = "pretrain"

    def __init__(self, prefix: str, *, seq_length: int, vocab_size: int) -> None:
        self.prefix, self.seq_length, self.vocab_size = prefix, seq_length, vocab_size
        self._ids = IndexedReader(prefix, dtypes=_DTYPES, empty=True)
        self.num_tokens = self._ids.num_tokens
        if not self.num_tokens:
            raise DataError("no tokens", where=f"{prefix}.bin", expected="text")
        self.num_packs = -(-self.num_tokens // seq_length)
        self._documents: np.ndarray = self._ids.doc_index[:-1]  # first sequence of each document that has tokens
        longest = self._read_documents()
        self.max_length = min(longest, seq_length)
        self.num_documents = len(self._documents)
        self.num_samples = self.num_documents + self.num_packs - len(self._aligned)
        self.meta: dict[str, Any] = {"task": "pretrain", "seq_length": seq_length, "tokenizer": None,
                                     "tokenizer_fingerprint": None}
        for row in np.unique(np.linspace(0, self.num_packs - 1, _PROBES).astype(int)).tolist():
            self._read(row)

    def _read_documents(self) -> int:
        """Find the documents with tokens, and the packs that begin with a document; returns the longest length."""
        index, longest, kept, aligned = self._ids.doc_index, 0, [], []
        for at in range(0, len(index) - 1, _CHUNK):
            firsts = index[at : at + _CHUNK + 1]
            starts = self._ids.starts(firsts)
            sizes = np.diff(starts)
            longest = max(longest, int(sizes.max()))
            kept.append(None if sizes.all() else firsts[:-1][sizes > 0])
            begins = starts[:-1][sizes > 0]
            aligned.append(begins[begins % self.seq_length == 0] // self.seq_length)
        if any(k is not None for k in kept):
            chunks = (index[at : at + _CHUNK][: len(index) - 1 - at] for at in range(0, len(index) - 1, _CHUNK))
            self._documents = np.concatenate([chunk if k is None else k for chunk, k in zip(chunks, kept, strict=True)])
        self._aligned = np.concatenate(aligned)
        return longest

    @property
    def note(self) -> str:
        """A note for the user before the run."""
        size = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens in packs of {self.seq_length:,}"
        return (f"note: {self.prefix} is Megatron-LM's own data: {size}. It does not say which tokenizer made it; "
                f"only that its ids are below {self.vocab_size:,} is checked")

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the first and last MiB of the index and the number of tokens. The files hold no checksums."""
        with open(f"{self.prefix}.idx", "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, Path(f"{self.prefix}.idx").stat().st_size - (1 << 20)))
            return hashlib.sha256(head + file.read() + str(self.num_tokens).encode()).hexdigest()

    def _start(self, document: int) -> int:
        return self._ids.start(int(self._documents[document]))

    def _first_sample(self, row: int) -> int:
        """Number of the first sample of a pack: the count of places before it where a document or a pack begins."""
        before = bisect_left(range(self.num_documents), row * self.seq_length, key=self._start)
        return before + row - int(np.searchsorted(self._aligned, row))

    def _read(self, row: int) -> np.ndarray:
        tokens = self._ids.span(row * self.seq_length, min((row + 1) * self.seq_length, self.num_tokens)).astype(
            np.int64
        )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            at = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            raise DataError(f"token id {tokens[at]} at token {row * self.seq_length + at:,} (pack {row:,})",
                            where=f"{self.prefix}.bin",
                            expected=f"ids of the model's vocabulary, 0 to {self.vocab_size - 1:,}",
                            fix="data made with the model's tokenizer")
        return tokens

    def pack(self, row: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The samples of one pack: (number, tokens int64 [T], mask uint8 [T])."""
        tokens, begin = self._read(row), row * self.seq_length
        document = bisect_right(range(self.num_documents), begin, key=self._start)
        cuts = []
        while document < self.num_documents and (start := self._start(document)) < begin + len(tokens):
            cuts.append(start - begin)
            document += 1
        pieces = np.split(tokens, cuts)
        return [(i, piece, (np.arange(len(piece)) > 0).astype(np.uint8))
                for i, piece in enumerate(pieces, self._first_sample(row))]

    def sample(self, i: int) -> tuple[int, np.ndarray, np.ndarray]:
        """One sample by its number: O(log packs x log documents)."""
        row = bisect_right(range(self.num_packs), i, key=self._first_sample) - 1
        return self.pack(row)[i - self._first_sample(row)]

    def row_lengths(self, row: int, *, packing: bool) -> list[int]:
        """Tokens of the samples of one row. Reads the row."""
        return [len(tokens) for _, tokens, _ in (self.pack(row) if packing else [self.sample(row)])]

    def longest_row(self, *, packing: bool) -> list[int]:
        return [min(self.seq_length, self.num_tokens) if packing else self.max_length]

    def margin(self, pair_index: int) -> None:
        return None

    def label(self, i: int) -> None:
        return None
