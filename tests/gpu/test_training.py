"""An optimizer step against torch's AdamW, and a run that goes on from its checkpoint bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_hf_model
from zoo import VOCAB, samples

from gpu.places import in_places

LR, CLIP, STEPS = 1e-3, 0.5, 4
FAMILIES = ("llama", "qwen3_moe")


def make_trainer(model_dir: Path, family: str, *, distributed: bool = True, dtype: str = "bfloat16") -> Any:
    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig, ParallelConfig
    from mrlhf.training.trainer import Trainer

    if not model_dir.exists():
        make_hf_model(model_dir, family, vocab_size=VOCAB, num_hidden_layers=2)
    optim = OptimConfig(
        lr=LR, lr_decay_style="constant", clip_grad=CLIP, adam_beta2=0.999, weight_decay=0.01,
        use_distributed_optimizer=distributed,
    )  # fmt: skip
    source = open_source(str(model_dir))
    return Trainer(source, ParallelConfig(), optim, head="lm", dtype=dtype, seed=1, total_steps=STEPS)


def steps(trainer: Any, count: int) -> list[dict[str, float]]:
    from mrlhf.data.loader import Sample, collate
    from mrlhf.sft import language_model_loss

    rows = [Sample(ids.numpy(), ids.numpy() * 0 + 1, i) for i, ids in enumerate(samples())]
    batches = [collate(rows[i : i + 2], packing=True) for i in (0, 2)]
    loss = language_model_loss(trainer, aggregation="token")
    return [trainer.step(batches, loss) for _ in range(count)]


@in_places(
    "family,distributed",
    cpu=[("llama", True)],
    gpu=[(family, distributed) for family in FAMILIES for distributed in (True, False)],
)
def test_a_step_is_adamw_on_fp32_weights(
    one_rank: None, tmp_path: Path, place: str, family: str, distributed: bool
) -> None:
    """bf16 weights are the rounded fp32 ones of torch's AdamW, which gets the same gradients."""
    trainer = make_trainer(tmp_path / family, family, distributed=distributed)
    named = [(name, p) for m in trainer.modules for name, p in m.named_parameters() if p.requires_grad]
    masters = [p.detach().float().clone().requires_grad_() for _, p in named]
    decayed = [x for (name, _), x in zip(named, masters) if x.dim() > 1]
    others = [x for x in masters if x.dim() == 1]  # no weight decay on norms and biases
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(STEPS):
        found = steps(trainer, 1)[0]
        for (_, p), master in zip(named, masters):
            master.grad = p.main_grad.detach().float().clone()
        norm = float(torch.nn.utils.clip_grad_norm_(masters, 1e9))  # what the step has clipped in place
        assert norm == pytest.approx(min(found["grad_norm"], CLIP), rel=1e-4)
        reference.step()
        for (name, p), master in zip(named, masters):
            unequal = float((p.detach() != master.to(p.dtype)).float().mean())  # at the edge between two bf16 numbers
            assert unequal < 0.002, name
            torch.testing.assert_close(p.detach(), master.detach().to(p.dtype), rtol=2**-7, atol=1e-6)


@in_places(
    "family,distributed",
    cpu=[("qwen3_moe", True)],
    gpu=[(family, distributed) for family in FAMILIES for distributed in (True, False)],
)
def test_a_checkpoint_is_bit_for_bit(
    one_rank: None, tmp_path: Path, place: str, family: str, distributed: bool
) -> None:
    """Weights, fp32 weights and moments; then the next loss, which no order of sums disturbs."""
    from mrlhf.checkpoint.save import save

    trainer = make_trainer(tmp_path / family, family, distributed=distributed)
    steps(trainer, 2)
    save(tmp_path / "step_2", [trainer.part()], {"stage": "sft", "step": 2, "dtype": "bfloat16"})
    again = make_trainer(tmp_path / family, family, distributed=distributed)
    assert not torch.equal(again.modules[0].embedding.word_embeddings.weight, trainer.tensors("weights")[0])
    again.resume(tmp_path / "step_2", 2, trainer.scheduler.num_steps)
    for (name, ours), theirs in zip(trainer.parameters().items(), again.parameters().values(), strict=True):
        assert torch.equal(ours, theirs), name
    kept, loaded = trainer.tensors("optimizer"), again.tensors("optimizer")
    assert len(kept) > 0 and all(torch.equal(a, b) for a, b in zip(kept, loaded, strict=True))
    assert [row["loss"] for row in steps(again, 1)] == [row["loss"] for row in steps(trainer, 1)]
