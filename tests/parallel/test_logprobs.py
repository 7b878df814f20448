"""Log-probs, entropy and gradient against torch, alone; tests/models/test_layouts.py has the same under tensor parallelism."""

from __future__ import annotations

import pytest
import torch

from mrlhf.parallel import logprobs
from mrlhf.parallel.logprobs import vocab_parallel_logprobs

N, PADDED, REAL = 11, 64, 50


def reference(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.log_softmax(logits[..., :REAL].float() / temperature, -1)
    return whole.gather(-1, targets[..., None])[..., 0], -(whole.exp() * whole).sum(-1)


def inputs(seed: int = 0, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, PADDED, generator=generator) * scale, torch.randint(0, REAL, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_values_and_gradient(monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int) -> None:
    """Chunks that do and do not divide the tokens; columns beyond the vocabulary get no probability and no gradient."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk * 4 * PADDED)
    logits, targets = inputs()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    logps, entropy, is_top = vocab_parallel_logprobs(ours, targets, vocab_size=REAL, temperature=temperature, with_entropy=True)
    wanted, wanted_entropy = reference(theirs, targets, temperature)
    torch.testing.assert_close(logps, wanted, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, wanted_entropy, atol=2e-6, rtol=1e-6)
    assert torch.equal(is_top, logits[:, :REAL].argmax(-1) == targets)
    (logps * weights[0] + entropy * weights[1]).sum().backward()
    (wanted * weights[0] + wanted_entropy * weights[1]).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-6, rtol=1e-5)
    assert not ours.grad[:, REAL:].any()


def test_gradient_equals_finite_differences() -> None:
    logits, targets = inputs(scale=1.0)
    direction, step = torch.randn(N, PADDED, generator=torch.Generator().manual_seed(2)), 1e-2

    def total(x: torch.Tensor) -> torch.Tensor:
        logps, entropy, _ = vocab_parallel_logprobs(x, targets, vocab_size=REAL, temperature=0.8, with_entropy=True)
        return (logps + 0.3 * entropy).sum()

    leaf = logits.clone().requires_grad_()
    total(leaf).backward()
    assert leaf.grad is not None
    slope = (total(logits + step * direction).double() - total(logits - step * direction).double()) / (2 * step)
    assert float((leaf.grad * direction).sum()) == pytest.approx(float(slope), abs=2e-3)


def test_only_one_of_the_outputs_used() -> None:
    logits, targets = inputs()
    for use in (0, 1):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        vocab_parallel_logprobs(ours, targets, vocab_size=REAL, with_entropy=True)[use].sum().backward()
        reference(theirs, targets, 1.0)[use].sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-6, rtol=1e-5)


def test_shape_dtype_and_input_are_kept() -> None:
    """Leading dimensions stay, bf16 logits give fp32 results and a bf16 gradient, and the logits are not edited in place."""
    logits, targets = inputs()
    half = logits.bfloat16().view(1, N, PADDED).requires_grad_()
    before = half.detach().clone()
    logps, entropy, is_top = vocab_parallel_logprobs(half, targets.view(1, N), vocab_size=REAL, temperature=0.5)
    assert logps.shape == entropy.shape == is_top.shape == (1, N)
    assert logps.dtype == torch.float32 and not entropy.any() and not entropy.requires_grad
    torch.testing.assert_close(logps[0], reference(before[0], targets, 0.5)[0], atol=2e-6, rtol=1e-6)
    logps.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16 and torch.equal(half.detach(), before)


def test_large_logits_do_not_overflow() -> None:
    logits, targets = inputs(scale=1e4)
    logps, entropy, _ = vocab_parallel_logprobs(logits, targets, vocab_size=REAL, with_entropy=True)
    assert logps.isfinite().all() and entropy.isfinite().all() and (entropy >= -1e-6).all()
