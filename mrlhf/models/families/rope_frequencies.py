"""Rotary positions and their frequencies, as transformers computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0, le=1e18)]  # false for nan


@dataclass(frozen=True)
class Rope:
    """Rotary positions. Frequency i of n = dimensions / 2 is theta ** (-i / n), then scaled."""

    theta: Positive = 10000.0
    fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0  # of the head's dimensions; those after it are not rotated
    interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (0, n), (1, n + 1), ...
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0  # llama3
    high_freq_factor: Positive = 4.0  # llama3
    original_length: Annotated[int, Meta(ge=1, le=1 << 40)] = 8192  # llama3 and yarn
    beta_fast: Positive = 32.0  # this and the next three: yarn
    beta_slow: Positive = 1.0
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None

    @property
    def qk_scale(self) -> float:
        """Yarn's factor for the product of a rotated query and key; it applies on top of `scores_scale`."""
        if self.scaling != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return (_mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)) ** 2
        return _mscale(self.factor, 1.0) ** 2

    @property
    def scores_scale(self) -> float:
        """The factor for all scores in DeepSeek's form of yarn."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.scaling == "yarn" and self.mscale_all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """[rotated dimensions / 2], radians per token, in fp32."""
    dim = int(head_dim * rope.fraction)
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "yarn":  # divides slow pairs by the factor, keeps fast ones, and interpolates between the two
        wavelengths = [rope.original_length / (turns * 2 * math.pi) for turns in (rope.beta_fast, rope.beta_slow)]
        low, high = (dim * math.log(length) / (2 * math.log(rope.theta)) for length in wavelengths)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
        return plain / rope.factor * ramp + plain * (1 - ramp)
    if rope.scaling == "llama3":
        low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_length
        wavelength = 2 * math.pi / plain
        smooth = (length / wavelength - low) / (high - low)
        between = (1 - smooth) * plain / rope.factor + smooth * plain
        slow = torch.where(wavelength > length / low, plain / rope.factor, between)
        return torch.where(wavelength < length / high, plain, slow)
    return plain
