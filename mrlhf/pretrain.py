"""Pretraining: next-token prediction on every token of every document, with the loop and the loss of SFT."""

from __future__ import annotations

from mrlhf.config.options import PretrainStage
from mrlhf.sft import train


def main(config: PretrainStage) -> int:
    return train(config)
