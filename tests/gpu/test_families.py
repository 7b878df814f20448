"""Every family against transformers: logits, loss and gradients, packed and padded on both sides.

bf16 is held to what transformers' own bf16 is away from its fp32 on the same device: no limit is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import make_hf_model
from zoo import KINDS, MOE, VOCAB

from gpu.places import apart, in_places

LENGTHS = {"cpu": (7, 30, 1, 19), "cuda": (7, 201, 1, 130, 64)}
LAYOUTS = ("packed", "right", "left")
# one token at the edge between two experts takes the other one: as much as transformers' bf16 was seen away for it
FLIP = {"logits": 0.06, "gradients": 0.14}


class Result(NamedTuple):
    logits: list[torch.Tensor]  # [T, V] of each sample
    loss: float  # mean over all predicted tokens
    gradients: dict[tuple[str, int], torch.Tensor]  # of each slice of a HF tensor in a Megatron parameter


def random_rows(vocab_size: int, lengths: Iterable[int]) -> list[torch.Tensor]:
    """Token ids without 0, which pads."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocab_size, (n,), generator=generator) for n in lengths]


def transformers_result(model_dir: Path, place: str, dtype: torch.dtype, rows: list[torch.Tensor]) -> Result:
    from transformers import AutoModelForCausalLM

    from mrlhf.checkpoint.source import open_source
    from mrlhf.models.families import megatron_map
    from mrlhf.models.hf_files import HFReader

    # eager: sdpa leaves out Gemma 2's soft cap
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").eval().to(place)
    rows = [ids.to(place) for ids in rows]
    logits = [model(ids[None]).logits[0] for ids in rows]
    predicted = [(x[:-1].float(), ids[1:]) for x, ids in zip(logits, rows) if len(ids) > 1]
    loss = sum(torch.nn.functional.cross_entropy(*pair, reduction="sum") for pair in predicted)
    loss = loss / sum(len(ids) for _, ids in predicted)
    loss.backward()
    # saved in the place of the weights, gradients get the names and shapes that the files have
    model.float()
    for p in model.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad.float()
    model.save_pretrained(model_dir / f"gradients_{dtype}")
    spec = open_source(str(model_dir)).spec
    reader = HFReader(model_dir / f"gradients_{dtype}", spec, head="lm")
    blocks = megatron_map(spec, head="lm", tp=1, rank=0)
    gradients = {(name, i): reader.read(b) for name, of_one in blocks.items() for i, b in enumerate(of_one)}
    return Result(logits, float(loss.detach()), gradients)


def our_result(model_dir: Path, dtype: str, layout: str, rows: list[torch.Tensor]) -> Result:
    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig, ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.models import gpt
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import Trainer

    optim = OptimConfig(lr=1e-3, lr_decay_style="constant", clip_grad=0.0)
    source = open_source(str(model_dir))
    trainer = Trainer(source, ParallelConfig(), optim, head="lm", dtype=dtype, seed=1, total_steps=9)
    samples = [Sample(ids.numpy(), ids.numpy() * 0 + 1, i) for i, ids in enumerate(rows)]
    side = {} if layout == "packed" else {"padding_side": layout}
    batch = collate(samples, packing=layout == "packed", **side)

    def logits(hidden_BTH, batch):
        logits_BTV = gpt.lm_head(trainer.modules[0], trainer.spec).logits(hidden_BTH)[..., : trainer.spec.vocab_size]
        return logits_BTV.float().permute(2, 0, 1)

    whole_VBT = trainer.forward([batch], logits, channels=trainer.spec.vocab_size)[0].cpu()
    by_channel = [batch.per_sample(x_BT) for x_BT in whole_VBT]
    step = trainer.step([batch], language_model_loss(trainer, aggregation="token"))
    squares = [p.main_grad.double().square().sum() for p in trainer.modules[0].parameters() if p.requires_grad]
    assert abs(float(torch.stack(squares).sum()) ** 0.5 / step["grad_norm"] - 1) < 1e-4
    gradients = {
        (name, i): parameter.main_grad.narrow(b.dim, b.offset, b.length)
        for name, parameter, blocks in gpt.local_blocks(trainer.modules[0], trainer.spec, head="lm")
        for i, b in enumerate(blocks)
        if parameter.requires_grad  # a router's selection bias has no gradient
    }
    return Result([torch.stack(of_sample, -1) for of_sample in zip(*by_channel)], step["loss"], gradients)


def distances(found: Result, wanted: Result) -> dict[str, float]:
    names = [name for name in wanted.gradients if name in found.gradients]
    missing = {name for name, _ in set(wanted.gradients) - set(found.gradients)}  # no gradient; tied to the embedding
    assert all(name.endswith(("expert_bias", "output_layer.weight")) for name in missing), missing
    return {
        "logits": apart(found.logits, wanted.logits),
        "loss": abs(found.loss - wanted.loss),
        "gradients": apart([found.gradients[n] for n in names], [wanted.gradients[n] for n in names]),
    }


@in_places("kind", cpu=((kind,) for kind in KINDS), gpu=((kind,) for kind in KINDS))
def test_a_family_equals_transformers(one_rank: None, tmp_path: Path, place: str, kind: str) -> None:
    family, changes = KINDS[kind]
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
    make_hf_model(tmp_path, family, vocab_size=VOCAB, seed=3, **{**layers, **changes})  # type: ignore[arg-type]
    rows = random_rows(VOCAB, LENGTHS[place])
    exact = transformers_result(tmp_path, place, torch.float32, rows)
    noise = distances(transformers_result(tmp_path, place, torch.bfloat16, rows), exact)
    print(f"{kind}: noise {noise}")
    for layout in LAYOUTS:
        ours = distances(our_result(tmp_path, "float32", layout, rows), exact)
        print(f"{kind} {layout} float32 {ours}")
        assert ours["logits"] < 1e-5 and ours["loss"] < 1e-5 and ours["gradients"] < 1e-4, (layout, ours)
        ours = distances(our_result(tmp_path, "bfloat16", layout, rows), exact)
        print(f"{kind} {layout} bfloat16 {ours}")
        for what in ("logits", "gradients"):
            limit = 1.5 * max(noise[what], FLIP[what] if kind in MOE else 0)
            assert ours[what] < limit, (layout, what, ours, noise)
        assert ours["loss"] < 2 * noise["logits"] + noise["loss"], (layout, ours, noise)
