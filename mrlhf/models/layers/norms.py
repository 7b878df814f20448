"""Norms for Megatron layers that need neither Transformer Engine nor apex and support sequence parallelism; the
residual's addition.

Megatron's `WrappedTorchNorm` refuses sequence parallelism. All that is missing there is the mark
`param.sequence_parallel`: each rank has the gradient of its own tokens, and `finalize_model_grads` sums the gradients
of marked parameters over the tensor-parallel group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class PlusOneRMSNorm(torch.nn.Module):
    """Gemma's norm: x / rms(x) * (1 + weight), computed in fp32."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.zeros(hidden_size, dtype=dtype)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def _make_norm(config, hidden_size: int, eps: float) -> torch.nn.Module:
    if config.layernorm_zero_centered_gamma:
        return PlusOneRMSNorm(hidden_size, eps, config.params_dtype)
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    return kind(hidden_size, eps=eps, dtype=config.params_dtype)


def _make_marked_norm(config, hidden_size: int, eps: float) -> torch.nn.Module:
    norm = _make_norm(config, hidden_size, eps)
    for p in norm.parameters():
        p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class Norm:
    """RMSNorm or LayerNorm by `config.normalization`, over the last dimension of [s, b, h]."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        return _make_marked_norm(config, hidden_size, eps)


class QKNorm:
    """Norm of queries or keys over the head dimension. It bears no mark: Megatron finds these norms by their name."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        return _make_norm(config, hidden_size, eps)


class WholeQKNorm(torch.nn.Module):
    """RMSNorm of queries (or keys) over all heads of all tensor-parallel ranks together: [s, b, n, d], n heads of this
    rank.

    Each rank has the weight of its own heads; the sum of squares is reduced over `group`, in forward and backward.
    heads: on all ranks together.
    """

    def __init__(self, config, hidden_size: int, eps: float, *, heads: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.width, self.eps = group, heads * hidden_size, eps
        self.weight = torch.nn.Parameter(torch.ones(self.width // self.group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        x = x_SBND.flatten(2).float()
        squares = x.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            squares = collective.all_reduce(squares, group=self.group)
        return (x * torch.rsqrt(squares / self.width + self.eps) * self.weight.float()).to(x_SBND.dtype).view_as(x_SBND)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        tensors = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(tensors, prefix, {"weight": 0}, sharded_offsets, **groups)


class ResidualAdd(torch.nn.Module):
    """x + scale * norm(branch + bias); replaces Megatron's bias-dropout-add. normed false: without the norm."""

    def __init__(self, config, *, normed: bool, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = _make_marked_norm(config, config.hidden_size, config.layernorm_epsilon) if normed else None

    def forward(self, training: bool, fused: bool):
        return self._add

    def _add(self, branch_and_bias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
        assert dropout == 0, "no dropout in RLHF"
        branch, bias = branch_and_bias
        if bias is not None:
            branch = branch + bias
        if self.norm is not None:
            branch = self.norm(branch)
        return residual + (branch if self.scale == 1 else branch * self.scale)
