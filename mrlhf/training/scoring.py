"""Scores of whole samples under a model with a value head.

Legend: B rows, T tokens, N samples.
"""

from __future__ import annotations

import torch

from mrlhf.data.loader import MicroBatch
from mrlhf.training.trainer import Model


def score_micro_batches(model: Model, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Scores [N] of every micro-batch: the head's value at the last real token of each sample."""
    values = model.forward(batches, lambda values_BT1, batch: values_BT1.squeeze(-1).float()[None], channels=1)
    return [batch.last(v_1BT[0].cpu()) for batch, v_1BT in zip(batches, values, strict=True)]
