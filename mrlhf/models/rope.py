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
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # the last three: llama3
    high_freq_factor: float = 4.0
    original_length: int = 8192


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """[rotated dimensions / 2], radians a token, as transformers computes them."""
    dim = int(head_dim * rope.fraction)
    found = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.scaling == "linear":
        return found / rope.factor
    if rope.scaling == "llama3":
        low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_length
        wavelength = 2 * math.pi / found
        smooth = (length / wavelength - low) / (high - low)
        between = (1 - smooth) * found / rope.factor + smooth * found
        slow = torch.where(wavelength > length / low, found / rope.factor, between)
        return torch.where(wavelength < length / high, found, slow)
    return found
