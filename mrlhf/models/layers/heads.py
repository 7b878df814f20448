"""The scalar head of critics and reward models; it replaces Megatron's output layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


class ValueHead(torch.nn.Linear):
    """Hidden states [s, b, h] (a slice of s under sequence parallelism) -> values [s, b, 1] in fp32, whole on every
    rank.

    group: tensor-parallel. Without sequence parallelism all its ranks have the same input and gradient. With it each
    rank has the gradient of its own tokens, and the mark on the weight makes `finalize_model_grads` sum them.
    """

    def __init__(self, config, group: dist.ProcessGroup) -> None:
        super().__init__(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        self.sequence_parallel, self.group = config.sequence_parallel, group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH, weight=None, runtime_gather_output=None):
        values_SB1 = F.linear(hidden_SBH, self.weight).float()
        if self.sequence_parallel:
            options = {"tensor_parallel_output_grad": False, "group": self.group}
            values_SB1 = gather_from_sequence_parallel_region(values_SB1, **options)
        return values_SB1, None

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + "_extra_state", None)  # Megatron's output layer writes one
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
