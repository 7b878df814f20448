"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training.

A token's noise depends on the run's seed, the step, its sample and its place in the sample alone. So packing, the
parallel layout and a resume do not change it.
"""

from __future__ import annotations

import hashlib

import torch

from mrlhf.data.loader import MicroBatch


def embedding_noise(batch: MicroBatch, *, hidden_size: int, alpha: float, seed: int, step: int,
                    device: str = "cpu") -> torch.Tensor:
    """[B, T, H] in fp32 for a whole micro-batch: uniform in +- alpha / sqrt(length of the sample x H), 0 at padding.

    batch: on the host, whose loop must not wait for `device`, where the noise is made.
    """
    rows, width = batch.tokens_BT.shape
    noise_NH = torch.zeros(rows * width, hidden_size, device=device)
    generator = torch.Generator(device)
    for index, last, length in zip(batch.index_N.tolist(), batch.last_N.tolist(), batch.lengths, strict=True):
        generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:7], "big"))
        size = alpha / (length * hidden_size) ** 0.5
        noise_NH[last - length + 1 : last + 1].uniform_(-size, size, generator=generator)
    return noise_NH.view(rows, width, hidden_size)
