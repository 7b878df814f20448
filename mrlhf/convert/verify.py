"""Compares the outputs of a checkpoint and a HF directory on random tokens, packed and unpacked, in fp32."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import ParallelConfig
from mrlhf.convert.hf import DTYPES, initialize_groups
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.errors import CheckpointError, EnvironmentProblem
from mrlhf.models import gpt
from mrlhf.models.families.spec import ModelSpec, read_hf_config
from mrlhf.models.hf_files import HFReader
from mrlhf.parallel import state
from mrlhf.training.trainer import Model

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # for a logit in fp32; a wrong mapping differs by 1e-1 and more
_LENGTHS = (5, 23, 12, 48)
_MOST_VALUES = 1 << 29  # logits of the longest sample: 2 GiB, four times


@dataclass(frozen=True)
class Comparison:
    """Differences of logits (or scores) over random tokens, packed and unpacked."""

    what: str
    max_abs: float
    mean_abs: float
    count: int

    @property
    def ok(self) -> bool:
        return self.max_abs <= TOLERANCE  # False for nan

    def summary(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        return (f"{self.what}: max |difference| {self.max_abs:.3e}, mean {self.mean_abs:.3e} of {self.count:,} values; "
                f"tolerance {TOLERANCE:g}: {verdict}")


def compare_models(source: ModelSource, hf: str, *, seed: int = 0) -> Comparison:
    """Runs the checkpoint (packed and unpacked) and plain transformers on the same random tokens, in fp32.

    If one side is stored in a narrower dtype, both are rounded to it: this checks the mapping, not the rounding.
    A value model is compared by its scores or, with a HF LM, by its head applied to transformers' hidden states.
    Raises CheckpointError if the models differ in shape. Memory: both models in fp32.
    """
    if state.world_size() > 1:
        raise EnvironmentProblem(f"{state.world_size()} processes", expected="one: verify without torchrun")
    initialize_groups()
    theirs = open_source(hf)
    if theirs.is_checkpoint:
        raise CheckpointError("it is a mrlhf checkpoint", where=hf, expected="a HF directory")
    if theirs.spec != source.spec:
        what = f"{source.path} and {theirs.path} are different models"
        raise CheckpointError(what, expected=f"{source.spec}", where=f"{theirs.spec}")
    if theirs.head == "value" and source.head == "lm":
        raise CheckpointError("the HF directory holds a value model, the checkpoint an LM", where=hf)
    rng = np.random.default_rng(seed)
    pad = read_hf_config(theirs.hf_dir).get("pad_token_id")
    ids = np.array([i for i in range(min(source.spec.vocab_size, 1 << 20)) if i != pad])
    lengths = [min(n, source.spec.max_position_embeddings) for n in _lengths(source.spec)]
    samples = [Sample(rng.choice(ids, n), np.ones(n, np.uint8), i) for i, n in enumerate(lengths)]

    reader = HFReader(theirs.path, theirs.spec, head=theirs.head)
    stored = DTYPES[source.manifest["dtype"]] if source.is_checkpoint else torch.float32
    ours, head_1H = _megatron_outputs(source, samples, {name: reader.dtype(name) for name in reader.tensors})
    wanted = _hf_outputs(theirs, samples, stored, head_1H)
    worst, total, count = 0.0, 0.0, 0
    for packing in (True, False):
        for mine, other in zip(ours[packing], wanted, strict=True):
            difference = (mine[-other.size(0) :] - other).abs()
            worst = max(worst, float(difference.max())) if difference.isfinite().all() else float("nan")
            total, count = total + float(difference.double().sum()), count + difference.numel()
    what = "logits" if source.head == "lm" else "scores" if theirs.head == "value" else "values"
    return Comparison(what, worst, total / count, count)


def _lengths(spec: ModelSpec) -> list[int]:
    """Lengths of the samples; the longest crosses every sliding window, if its logits are not too many."""
    over = max((layer.window or 0 for layer in spec.layers), default=0) + 8
    longest = min(max(over, _LENGTHS[-1]), max(_LENGTHS[-1], _MOST_VALUES // spec.vocab_size))
    if longest < min(over, spec.max_position_embeddings):
        log.warning(f"the samples are at most {longest:,} tokens long: they do not cross the window of {over - 8:,}")
    return [*_LENGTHS[:-1], longest]


@torch.no_grad()
def _megatron_outputs(
    source: ModelSource, samples: list[Sample], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[bool, list[torch.Tensor]], torch.Tensor | None]:
    """({packing: [T, V] logits or [T, 1] values of each sample}, the value head's weight [1, H] or None)."""
    spec, head = source.spec, source.head
    model = Model(source, ParallelConfig(), head=head, dtype="float32", seed=1)
    for _, parameter, slices in gpt.local_blocks(model.modules[0], spec, head=head):
        for s in slices:
            view = parameter.narrow(s.dim, s.offset, s.length)
            view.copy_(view.to(dtypes.get(s.hf, torch.float32)))
    channels = spec.vocab_size if head == "lm" else 1

    def outputs(out_BTX: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        logits_or_values = gpt.lm_head(model.modules[0], spec).logits(out_BTX) if head == "lm" else out_BTX
        return logits_or_values[..., :channels].float().permute(2, 0, 1)

    by_packing = {}
    for packing in (True, False):
        batch = collate(samples, packing=packing)
        per_channel = [batch.per_sample(x_BT.cpu()) for x_BT in model.forward([batch], outputs, channels=channels)[0]]
        by_packing[packing] = [torch.stack(of_sample, dim=-1) for of_sample in zip(*per_channel, strict=True)]
    return by_packing, model.parameters()["output_layer.weight"].cpu() if head == "value" else None


@torch.no_grad()
def _hf_outputs(
    theirs: ModelSource, samples: list[Sample], stored: torch.dtype, head_1H: torch.Tensor | None
) -> list[torch.Tensor]:
    """[T, V] logits or [T, 1] values of each sample; [1, 1] scores if the directory has its own score head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if theirs.head == "value" else AutoModelForCausalLM
    model = kind.from_pretrained(
        theirs.path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    outputs = []
    for sample in samples:
        ids_1T = torch.from_numpy(sample.tokens)[None]
        if head_1H is not None and theirs.head == "lm":
            outputs.append(model.base_model(ids_1T).last_hidden_state[0] @ head_1H.T)
        else:
            logits = model(ids_1T).logits
            outputs.append(logits.reshape(-1, 1) if theirs.head == "value" else logits[0])
    return outputs
