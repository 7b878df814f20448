"""Every layout = one process, packed = padded, one process = a plain transformers loop on the same data; in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_benchmark

equivalence = load_benchmark("equivalence")
STEPS, TOLERANCE, Steps = equivalence.STEPS, equivalence.TOLERANCE, equivalence.Steps
CASES = equivalence.cases(tested=True)


def agree(ours: Steps, theirs: Steps, tolerance: float = TOLERANCE) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance), (step, key)


@pytest.fixture(scope="module")
def results(world: Path) -> dict[tuple[str, str], Steps]:
    return equivalence.run(world, CASES)


@pytest.mark.parametrize(("layout", "stage"), [c for c in CASES if c[0] != equivalence.base(c[0])])
def test_layout_equals_one_process(results: dict[tuple[str, str], Steps], layout: str, stage: str) -> None:
    ours = results[layout, stage]
    agree(ours, results[equivalence.base(layout), stage])
    assert ours[-1]["loss"] < ours[0]["loss"]
    if stage == "dpo":
        assert ours[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_noise_changes_the_loss(results: dict[tuple[str, str], Steps]) -> None:
    with_noise, without = (results[name, "sft"] for name in ("NEFTune, 1 process", "1 process"))
    assert all(1e-5 < abs(a["loss"] / b["loss"] - 1) < 0.1 for a, b in zip(with_noise, without, strict=True))


def reference(world: Path) -> Steps:
    """transformers, torch's AdamW, one sample at a time, the mean over all trained tokens."""
    from transformers import AutoModelForCausalLM

    from mrlhf.data.indexed import PackedDataset

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(world / "qwen2", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    data = PackedDataset.open(world / "sft_few")
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


def test_sft_equals_transformers(world: Path, results: dict[tuple[str, str], Steps]) -> None:
    agree(results["1 process", "sft"], reference(world))
