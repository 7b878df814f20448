"""Pretraining: next-token prediction over every token of every document, on the loss of SFT."""

from __future__ import annotations

from mrlhf.config.options import PretrainStage
from mrlhf.data.loader import Loader
from mrlhf.models.layers.router_losses import count_for
from mrlhf.sft import language_model_loss
from mrlhf.training import run as supervised
from mrlhf.training.trainer import LossFn, Trainer


def main(config: PretrainStage) -> int:
    def make_loss(trainer: Trainer, loader: Loader) -> LossFn:
        return language_model_loss(trainer, aggregation=config.loss.aggregation, z_loss=config.loss.z_loss)

    return supervised.train("pretrain", config, head="lm", make_loss=make_loss, count=count_for(config.loss))
