"""Shards -> packs -> the files of a PREFIX. Rows pass through in windows, so memory does not grow with the data.

Each window (32 Mi tokens or 1 Mi samples) is packed and shuffled by itself. A set that fits in one window gets the
best-fit-decreasing packs of the whole set; in a larger set the last packs of a window are less full, and the shuffle of
the training mixes the windows.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np

from mrlhf.data.pack import pack
from mrlhf.data.prepare.shards import Shard
from mrlhf.data.writer import OutputSet

WINDOW_TOKENS = 32 << 20
WINDOW_SAMPLES = 1 << 20
_SLICE = 1 << 20  # tokens gathered at once


class Assembler:
    """One output set. `add` rows in order, then `finish`."""

    def __init__(self, output: OutputSet, *, task: str, seq_length: int, dtype: np.dtype, packed: bool, order: str,
                 seed: int, margins: bool):
        """`order` of documents in a window: "shuffled" (by `seed`), "length" (as packed, longest first), "input"."""
        self.output, self.task, self.seq_length = output, task, seq_length
        self.packed, self.order, self.seed = packed, order, seed
        self.each = 2 if task == "preference" else 1  # samples that must stay together
        self._ids_out = output.indexed("", dtype)
        self._mask_out = None if task == "prompts" else output.indexed("_loss_mask", np.dtype("uint8"))
        self._margin_out = output.indexed("_margin", np.dtype("float32")) if margins else None
        self._labels_out = output.stream("_labels.jsonl") if task == "prompts" else None
        self._any_label = False
        self._waiting: list[dict[str, Any]] = []
        self._tokens = self._samples = self._windows = 0
        self.num_packs = self.num_tokens = self.num_trained = self.num_rows = self.longest_pack = 0
        self._lengths = np.zeros(seq_length + 1, np.int64)  # samples by length

    def add(self, shard: Shard, rows: np.ndarray) -> None:
        """The rows of `shard` where `rows` (bool [R]) is true."""
        samples = np.repeat(rows, shard.row_samples)
        if not samples.any():
            return
        part: dict[str, Any] = {"lengths": shard.lengths[samples]}
        every = samples.all()
        tokens = slice(None) if every else np.repeat(samples, shard.lengths)
        part["ids"] = shard.ids[tokens]
        if self._mask_out is not None:
            part["mask"] = shard.mask[tokens]
        if self._margin_out is not None:
            part["margins"] = shard.margins[rows]
        if self._labels_out is not None:
            part["labels"] = [label for label, take in zip(shard.labels, rows.tolist(), strict=True) if take]
        self.num_rows += int(rows.sum())
        self._waiting.append(part)
        self._tokens += len(part["ids"])
        self._samples += len(part["lengths"])
        if self._tokens >= WINDOW_TOKENS or self._samples >= WINDOW_SAMPLES:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        joined = {name: np.concatenate([part[name] for part in self._waiting])
                  for name in self._waiting[0]
                  if name != "labels"}
        labels = list(chain.from_iterable(part.get("labels", ()) for part in self._waiting))
        self._waiting, self._tokens, self._samples = [], 0, 0
        lengths = joined["lengths"].astype(np.int64)
        units = lengths.reshape(-1, self.each).sum(axis=1)
        members, sizes = self._documents(units)
        order = (members[:, None] * self.each + np.arange(self.each)).reshape(-1)
        self._write(joined, lengths, order, sizes * self.each)
        if self._margin_out is not None:
            self._margin_out.add_documents(joined["margins"][members], np.ones(len(members), np.int64), sizes)
        if self._labels_out is not None:
            self._any_label = self._any_label or any(label != b"null" for label in labels)
            self._labels_out.write(b"".join(labels[i] + b"\n" for i in members.tolist()))
        self._lengths += np.bincount(lengths, minlength=self.seq_length + 1)
        self.num_packs += len(sizes)
        self.longest_pack = max(self.longest_pack, int(np.add.reduceat(units[members], np.cumsum(sizes) - sizes).max()))
        self._windows += 1

    def _documents(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(units in file order, number of units of each document)."""
        rng = np.random.default_rng(self.seed + self._windows)
        if not self.packed:
            members = rng.permutation(len(units)) if self.order == "shuffled" else np.arange(len(units))
            return members, np.ones(len(units), np.int64)
        packs = pack(units, capacity=self.seq_length)
        if self.order == "shuffled":
            packs = [packs[i] for i in rng.permutation(len(packs))]
        sizes = np.fromiter(map(len, packs), np.int64, len(packs))
        return np.fromiter(chain.from_iterable(packs), np.int64, int(sizes.sum())), sizes

    def _write(self, joined: dict[str, np.ndarray], lengths: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> None:
        """Gather the samples in `order`; `sizes`: samples a document."""
        starts = np.cumsum(lengths) - lengths
        ends = np.cumsum(sizes)
        totals = np.add.reduceat(lengths[order], ends - sizes)
        cuts = np.flatnonzero(np.diff(np.cumsum(totals) // _SLICE, prepend=0)).tolist()
        for first, last in zip([0, *cuts], [*cuts, len(sizes)], strict=True):
            if first == last:
                continue
            mine = order[ends[first] - sizes[first] : ends[last - 1]]
            n = lengths[mine]
            shift = np.repeat(starts[mine] - (np.cumsum(n) - n), n)
            index = shift + np.arange(len(shift))
            self._ids_out.add_documents(joined["ids"][index], n, sizes[first:last])
            self.num_tokens += len(index)
            if self._mask_out is not None:
                mask = joined["mask"][index]
                self.num_trained += int(mask.sum())
                self._mask_out.add_documents(mask, n, sizes[first:last])

    def finish(self) -> dict[str, Any]:
        """Write the last window; returns the figures of the set for its metadata."""
        self._flush()
        if self._labels_out is not None and not self._any_label:
            self.output.discard("_labels.jsonl")
        samples = int(self._lengths.sum())
        room = self.num_packs * self.seq_length
        return {
            "packed": self.packed,
            "num_kept": self.num_rows,
            "num_samples": samples,
            "num_packs": self.num_packs,
            "num_pairs": samples // 2 if self.each == 2 else None,
            "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained,
            "trained_share": round(self.num_trained / self.num_tokens, 6),
            "fill_rate": round(self.num_tokens / room, 6),
            "fewest_packs": -(-self.num_tokens // self.seq_length),
            "lengths": _percentiles(self._lengths),
            "pack_lengths_max": self.longest_pack,
            "samples_per_pack": round(samples / self.num_packs, 3),
        }


def _percentiles(by_length: np.ndarray) -> dict[str, float]:
    """Percentiles, extremes and mean of lengths; `by_length[n]` counts the samples of n tokens."""
    below, points = np.cumsum(by_length), (5, 25, 50, 75, 90, 95, 99)
    total, present = int(below[-1]), np.flatnonzero(by_length)
    percentiles = {f"p{p}": int(np.searchsorted(below, p * total / 100)) for p in points}
    mean = float((by_length * np.arange(len(by_length))).sum()) / total
    return {"min": int(present[0]), **percentiles, "max": int(present[-1]), "mean": round(mean, 2)}


def merged(counts: list[dict[str, int]]) -> dict[str, int]:
    """Drops of all shards by cause."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
