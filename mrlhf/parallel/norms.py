"""Norms for Megatron layers without Transformer Engine or apex; right under sequence parallelism.

Megatron's `WrappedTorchNorm` refuses sequence parallelism. What it takes is the mark
`param.sequence_parallel`: each rank has the gradient of its share of the tokens, and
`finalize_model_grads` then sums the marked ones over the tensor-parallel group.
"""

from __future__ import annotations

import torch


def _make(config, hidden_size: int, eps: float) -> torch.nn.Module:
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    return kind(hidden_size, eps=eps, dtype=config.params_dtype)


class Norm:
    """RMSNorm or LayerNorm by `config.normalization`, over the last dimension of [s, b, h]."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        norm = _make(config, hidden_size, eps)
        for p in norm.parameters():
            p.sequence_parallel = config.sequence_parallel
        return norm


class QKNorm:
    """Norm of queries or keys over the head dimension. Not marked: Megatron finds these by their name."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        return _make(config, hidden_size, eps)
