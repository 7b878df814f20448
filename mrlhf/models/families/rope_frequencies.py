"""Kinds of rotary positions, and their frequencies as transformers computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Rope:
    """Rotary positions. Frequency i of n = dimensions / 2 is theta ** (-i / n), then scaled."""

    theta: float = 10000.0
    fraction: float = 1.0  # of the head's dimensions, from the first on; the rest is not rotated
    interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (0, n), (1, n + 1), ...
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # these two: llama3
    high_freq_factor: float = 4.0
    original_length: int = 8192  # llama3 and yarn
    beta_fast: float = 32.0  # from here on yarn's
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def qk_scale(self) -> float:
        """What yarn multiplies the product of a rotated query and key by, beside `scores_scale`."""
        if self.scaling != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return (_mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)) ** 2
        return _mscale(self.factor, 1.0) ** 2

    @property
    def scores_scale(self) -> float:
        """What DeepSeek's yarn multiplies all scores by."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.scaling == "yarn" and self.mscale_all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """[rotated dimensions / 2], radians a token, as transformers computes them."""
    dim = int(head_dim * rope.fraction)
    found = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.scaling == "linear":
        return found / rope.factor
    if rope.scaling == "yarn":  # slow pairs are slowed down by the factor, fast ones stay; between the two a ramp over the pairs
        low, high = (
            dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta)) for turns in (rope.beta_fast, rope.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
        return found / rope.factor * ramp + found * (1 - ramp)
    if rope.scaling == "llama3":
        low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_length
        wavelength = 2 * math.pi / found
        smooth = (length / wavelength - low) / (high - low)
        between = (1 - smooth) * found / rope.factor + smooth * found
        slow = torch.where(wavelength > length / low, found / rope.factor, between)
        return torch.where(wavelength < length / high, found, slow)
    return found
