"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training.

The noise of a token depends on the run's seed, the step, its sample and its place in it, and on nothing else: the same packed or padded,
under any layout, and after a resume.
"""

from __future__ import annotations

import hashlib

import torch

from mrlhf.data.loader import MicroBatch


def noise(batch: MicroBatch, *, hidden_size: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """[B, T, H], fp32, of a whole micro-batch: uniform in +- alpha / sqrt(length of the sample x H), 0 at padding."""
    rows, width = batch.tokens_BT.shape
    where = batch.tokens_BT.device
    found = torch.zeros(rows * width, hidden_size, device=where)
    generator = torch.Generator(where)
    for index, last, length in zip(batch.index_N.tolist(), batch.last_N.tolist(), batch.lengths, strict=True):
        generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:7], "big"))
        size = alpha / (length * hidden_size) ** 0.5
        found[last - length + 1 : last + 1].uniform_(-size, size, generator=generator)
    return found.view(rows, width, hidden_size)
