"""Samples -> micro-batches, packed or padded. order.py decides which rows a step reads.

Legend: B rows, T tokens of a row, N samples of the micro-batch, P pairs.
Packed: one row [1, T] of all samples. Unpacked: one row per sample. In both, `segments_BT` (a sample's number at each
of its tokens, N at padding) and `last_N` (flat index of its last token) locate a sample, so one loss serves both, and
`bounds` says which of the tokens [B T] see each other, so one attention serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from mrlhf.data.batching import BatchPlan
from mrlhf.data.blend import Blend, Dataset, rows_of


@dataclass(frozen=True)
class Sample:
    """mask[t]: 1 if token t is trained. index: in the data set. weight: in the loss; 0 marks a filler."""

    tokens: np.ndarray
    mask: np.ndarray
    index: int
    weight: float = 1.0


@dataclass(frozen=True)
class MicroBatch:
    """Position t predicts `targets_BT[t]` (the next token of the same sample) with the weight `mask_BT[t]`."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    mask_BT: torch.Tensor  # float
    segments_BT: torch.Tensor
    positions_BT: torch.Tensor  # place of each token in its sample; 0 at padding
    last_N: torch.Tensor
    weights_N: torch.Tensor
    index_N: torch.Tensor
    lengths: tuple[int, ...]
    # Attention is causal within the tokens bounds[i] .. bounds[i + 1] of the flattened rows: a sample, alone or with
    # padding behind it, or padding.
    bounds: tuple[int, ...]
    cu_seqlens: torch.Tensor  # bounds as int32, for kernels
    place_BT: torch.Tensor | None = None  # rollouts: index, in its answer, of the token that a position predicts
    # A context-parallel rank's part: the [B, T] fields hold tokens first .. first + T of every row, and last_N is -1 if
    # the sample ends on another rank. bounds are those of whole rows. over_ranks sums over the ranks, with gradient.
    first: int = 0
    over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
    ptx: bool = False  # holds pretraining data, mixed into an update of PPO's actor

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(end - start for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True))

    def to(self, device: str) -> MicroBatch:
        """`index_N` stays on the host: data sets and tables are looked up by it, and the host must not wait for it."""
        if device == "cpu":
            return self
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor) and k != "index_N"}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})

    def sum_N(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Sum over each sample's tokens on all context-parallel ranks: [N]."""
        out = torch.zeros(self.num_samples + 1, dtype=x_BT.dtype, device=x_BT.device)
        out = out.index_add(0, self.segments_BT.reshape(-1), x_BT.reshape(-1))[:-1]
        return out if self.over_ranks is None else self.over_ranks(out)

    def last(self, x_BT: torch.Tensor) -> torch.Tensor:
        """The value at each sample's last token, from the context-parallel rank that holds it: [N]."""
        if self.over_ranks is None:
            return x_BT.reshape(-1)[self.last_N]
        return self.over_ranks(torch.where(self.last_N >= 0, x_BT.reshape(-1)[self.last_N.clamp(min=0)], 0.0))

    def per_sample(self, x_BT: torch.Tensor) -> list[torch.Tensor]:
        """The values of each sample, one tensor [tokens] per sample."""
        flat = x_BT.reshape(-1)
        return [flat[last - length + 1 : last + 1]
                for last, length in zip(self.last_N.tolist(), self.lengths, strict=True)]


def collate(samples: list[Sample], *, packing: bool, pad_multiple: int = 1, padding_side: str = "right") -> MicroBatch:
    """Makes one micro-batch. pad_multiple: T is a multiple of it (context and sequence parallelism split rows).

    Attention treats padding behind a pack or before a sample as a separate sample.
    """
    lengths = [len(s.tokens) for s in samples]
    n = len(samples)
    if packing:
        total = sum(lengths)
        width = -(-total // pad_multiple) * pad_multiple
        rows, starts = 1, np.cumsum([0, *lengths[:-1]])
    else:
        width = -(-max(lengths) // pad_multiple) * pad_multiple
        rows, starts = n, np.arange(n) * width
        if padding_side == "left":
            starts = starts + width - np.array(lengths)
    tokens, targets = np.zeros(rows * width, np.int64), np.zeros(rows * width, np.int64)
    mask, segments = np.zeros(rows * width, np.float32), np.full(rows * width, n, np.int64)
    positions = np.zeros(rows * width, np.int64)
    for i, (sample, start, length) in enumerate(zip(samples, starts, lengths, strict=True)):
        end = start + length
        tokens[start:end] = sample.tokens
        targets[start : end - 1] = sample.tokens[1:]
        if sample.weight:
            mask[start : end - 1] = sample.mask[1:]
        segments[start:end], positions[start:end] = i, np.arange(length)
    bounds = sorted({*range(0, rows * width + 1, width), *map(int, starts), *([total] if packing else [])})
    shape = (rows, width)
    return MicroBatch(
        tokens_BT=torch.from_numpy(tokens.reshape(shape)), targets_BT=torch.from_numpy(targets.reshape(shape)),
        mask_BT=torch.from_numpy(mask.reshape(shape)), segments_BT=torch.from_numpy(segments.reshape(shape)),
        positions_BT=torch.from_numpy(positions.reshape(shape)),
        last_N=torch.from_numpy(np.asarray(starts) + np.array(lengths) - 1),
        weights_N=torch.tensor([s.weight for s in samples], dtype=torch.float32),
        index_N=torch.tensor([s.index for s in samples]), lengths=tuple(lengths), bounds=tuple(bounds),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
    )


class Loader:
    """Makes this data-parallel rank's micro-batches by a BatchPlan. A row is a pack, a pair or a sample."""

    def __init__(self, dataset: Dataset, plan: BatchPlan) -> None:
        self.dataset, self.plan = dataset, plan
        self.group = 2 if dataset.task == "preference" else 1

    @property
    def num_rows(self) -> int:
        return rows_of(self.dataset, packing=self.plan.packing)

    def samples(self, row: int) -> list[Sample]:
        """The samples of a row. Row -1 is a filler: the first row with weight 0."""
        is_real, row = row >= 0, max(row, 0)
        d, first = self.dataset, row * self.group
        samples = d.pack(row) if self.plan.packing else [d.sample(i) for i in range(first, first + self.group)]
        return [Sample(tokens, mask, i, self._weight(i) if is_real else 0.0) for i, tokens, mask in samples]

    def _weight(self, i: int) -> float:
        return self.dataset.loss_weight(i) if isinstance(self.dataset, Blend) else 1.0

    def micro_batches(self, rows: list[int]) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch."""
        parts = self.plan.split(rows, lambda row: self.dataset.row_lengths(row, packing=self.plan.packing))
        return [self._collate([s for row in part for s in self.samples(row)]) for part in parts]

    def _collate(self, samples: list[Sample]) -> MicroBatch:
        plan = self.plan
        if self.group == 2 and not plan.packing:  # cat(chosen, rejected) -> [2B, T]
            samples = samples[0::2] + samples[1::2]
        return collate(samples, packing=plan.packing, pad_multiple=plan.pad_multiple, padding_side=plan.padding_side)

    def pairs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample indices [P] of the chosen and the rejected answers of a preference micro-batch."""
        return self._halves(torch.arange(batch.num_samples, device=batch.weights_N.device))

    def _halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x[0::2], x[1::2]) if self.plan.packing else (x[: len(x) // 2], x[len(x) // 2 :])

    def margins(self, batch: MicroBatch) -> torch.Tensor | None:
        """The margins [P] of a preference micro-batch; None if the data has none."""
        values = [self.dataset.margin(index // 2) for index in self._halves(batch.index_N)[0].tolist()]
        return None if values[0] is None else torch.tensor(values, dtype=torch.float32)

    def in_order(self) -> Iterator[list[int]]:
        """All rows once, for evaluation and scoring, in slices that give every rank equally many micro-batches."""
        unit = self.plan.rows_per_slice
        if self.plan.max_tokens is not None:  # several micro-batches per slice, to group rows by length
            unit *= max(1, 4 * self.plan.max_tokens * self.num_rows // self.dataset.num_tokens)
        for at in range(0, self.num_rows, unit):
            rows = list(range(at, min(at + unit, self.num_rows)))
            yield rows + [-1] * (unit - len(rows))
