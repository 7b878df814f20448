"""TP = SP = PP = DP = one process = a plain transformers loop on the same data, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TESTS, torchrun

STEPS = 5
LAYOUTS = {
    "1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2+sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2xpp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def train(world: Path, data: str, ranks: int, **options: object) -> list[dict[str, float]]:
    args = [f"{k}={v}" for k, v in options.items()]
    done = torchrun(ranks, TESTS / "parallel/parity_program.py", world / "qwen2", world / data, STEPS, *args)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def agree(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance), (step, key)


@pytest.fixture(scope="module")
def reference(world: Path) -> list[dict[str, float]]:
    """transformers, torch's AdamW, one sample at a time, the mean over all trained tokens."""
    from transformers import AutoModelForCausalLM

    from mrlhf.data.indexed import PackedDataset

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(world / "qwen2", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    data = PackedDataset.open(world / "sft")
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total, tokens = torch.zeros(()), 0
        for i in range(data.num_samples):
            ids, mask = torch.from_numpy(data.tokens(i)), torch.from_numpy(data.mask(i)).bool()
            logits = model(ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum")
            tokens += int(mask[1:].sum())
        (total / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found.append({"loss": float(total.detach() / tokens), "grad_norm": float(norm)})
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_sft_equals_transformers(world: Path, reference: list[dict[str, float]], name: str) -> None:
    ranks, options = LAYOUTS[name]
    ours = train(world, "sft", ranks, **options)
    agree(ours, reference)
    assert ours[-1]["loss"] < ours[0]["loss"]


@pytest.mark.parametrize(("stage", "data"), [("sft", "sft"), ("rm", "pref"), ("dpo", "pref")])
def test_packed_equals_unpacked(world: Path, stage: str, data: str) -> None:
    # Adam moves parameters whose true gradient is 0 by +-lr on rounding noise; a small lr keeps that below the tolerance
    options = {"stage": stage, "lr": 1e-4}
    packed = train(world, data, 1, **options)
    agree(packed, train(world, data, 1, **options, packing=0, micro=5))
    agree(packed, train(world, data, 2, **options, packing=0, micro=3, tensor_model_parallel_size=2, sequence_parallel="true"))
    if stage == "dpo":
        assert packed[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    if stage == "rm":
        agree(packed, train(world, data, 1, **options, packing=0, micro=4, side="left"))
        agree(packed, train(world, data, 2, **options, pipeline_model_parallel_size=2))
