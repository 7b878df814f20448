"""Log-probs, entropy and gradients against torch, alone; tests/models/test_layouts.py has the same under tensor
parallelism.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mrlhf.models.layers import logprobs
from mrlhf.models.layers.logprobs import Head, head_logprobs

N, H, PADDED, REAL = 11, 6, 64, 50


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ weight[:REAL].T).float() * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    whole = torch.log_softmax(logits / temperature, -1)
    return whole.gather(-1, targets[..., None])[..., 0], -(whole.exp() * whole).sum(-1)


def inputs(seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, H, generator=generator) * scale, torch.randn(PADDED, H, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, REAL, (N,), generator=generator)


def gradients(total: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int, softcap: float | None
) -> None:
    """Chunks that do and do not divide the tokens; rows beyond the vocabulary get no probability and no gradient."""
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", chunk * 4 * REAL)
    hidden, weight, targets = inputs()
    factors = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    head = Head(weight, REAL, scale=0.5, softcap=softcap)
    logps, entropy, is_top, _ = head_logprobs(hidden, targets, head, temperature=temperature, with_entropy=True)
    wanted, wanted_entropy = reference(hidden, weight, targets, temperature, 0.5, softcap or 0.0)
    torch.testing.assert_close(logps, wanted, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, wanted_entropy, atol=5e-6, rtol=1e-6)
    assert torch.equal(is_top, head.logits(hidden)[:, :REAL].argmax(-1) == targets)
    ours = gradients((logps * factors[0] + entropy * factors[1]).sum(), hidden, weight)
    theirs = gradients((wanted * factors[0] + wanted_entropy * factors[1]).sum(), hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not ours[1][REAL:].any()


def test_log_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 3 * 4 * REAL)
    hidden, weight, targets = inputs()
    found = head_logprobs(hidden, targets, Head(weight, REAL, softcap=3.0), temperature=0.7, with_entropy=True)
    wanted = torch.logsumexp(3.0 * torch.tanh(hidden @ weight[:REAL].T / 3.0) / 0.7, -1)
    torch.testing.assert_close(found.log_z, wanted, atol=2e-6, rtol=1e-6)
    wanted_logps, wanted_entropy = reference(hidden, weight, targets, 0.7, softcap=3.0)
    ours = gradients((found.log_z.square() - found.logps + 0.1 * found.entropy).sum(), hidden, weight)
    theirs = gradients((wanted.square() - wanted_logps + 0.1 * wanted_entropy).sum(), hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_gradient_equals_finite_differences() -> None:
    hidden, weight, targets = inputs(scale=1.0)
    generator, step = torch.Generator().manual_seed(2), 1e-2
    towards = torch.randn(N, H, generator=generator), torch.randn(PADDED, H, generator=generator)

    def total(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logps, entropy, *_ = head_logprobs(h, targets, Head(w, REAL, softcap=5.0), temperature=0.8, with_entropy=True)
        return (logps + 0.3 * entropy).sum()

    found = sum(
        float((g * t).sum()) for g, t in zip(gradients(total(hidden, weight), hidden, weight), towards, strict=True)
    )
    ends = [total(hidden + s * step * towards[0], weight + s * step * towards[1]).detach().double() for s in (1, -1)]
    assert found == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=5e-3)


def test_only_one_of_the_outputs_used() -> None:
    hidden, weight, targets = inputs()
    for use in (0, 1):
        ours = gradients(
            head_logprobs(hidden, targets, Head(weight, REAL), with_entropy=True)[use].sum(), hidden, weight
        )
        theirs = gradients(reference(hidden, weight, targets)[use].sum(), hidden, weight)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [5, 0])
def test_only_kept_tokens(kept: int) -> None:
    """Zeros elsewhere, and the gradient of the kept ones alone; none at all is no error."""
    hidden, weight, targets = inputs()
    keep = torch.zeros(N)
    keep[torch.randperm(N, generator=torch.Generator().manual_seed(3))[:kept]] = 1
    logps, entropy, is_top, _ = head_logprobs(hidden, targets, Head(weight, REAL), with_entropy=True, keep=keep)
    wanted, wanted_entropy = reference(hidden, weight, targets)
    torch.testing.assert_close(logps, wanted * keep, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, wanted_entropy * keep, atol=5e-6, rtol=1e-6)
    assert not is_top[keep == 0].any()
    for a, b in zip(
        gradients(logps.sum(), hidden, weight), gradients((wanted * keep).sum(), hidden, weight), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets = inputs()
    head_logprobs(hidden, targets, Head(weight.detach(), REAL))[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_shape_and_dtype() -> None:
    """Leading dimensions stay; bf16 gives fp32 results and bf16 gradients, near the fp32 ones of the same numbers."""
    hidden, weight, targets = inputs()
    half, half_weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    logps, entropy, is_top, _ = head_logprobs(
        half.view(1, N, H), targets.view(1, N), Head(half_weight, REAL), temperature=0.5
    )
    assert logps.shape == entropy.shape == is_top.shape == (1, N)
    assert logps.dtype == torch.float32 and not entropy.any() and not entropy.requires_grad
    wanted = reference(half.float(), half_weight.float(), targets, 0.5)[0]
    torch.testing.assert_close(logps[0], wanted, atol=2e-6, rtol=1e-6)
    ours = gradients(logps.sum(), half, half_weight)
    whole = [x.detach().float().requires_grad_() for x in (half, half_weight)]
    theirs = gradients(reference(whole[0], whole[1], targets, 0.5)[0].sum(), *whole)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.float() - b).norm() / b.norm()) < 1e-2


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bf16_logits_keep_fp32_digits(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    """Logits near 30 of hidden states that differ by bf16 rounding: bf16 logits would move a ratio by 13 % and more."""
    monkeypatch.setattr(logprobs, "_TILE_BYTES", 7 * 4 * 64)  # several tiles of the head
    generator = torch.Generator().manual_seed(0)
    n, h, v = 500, 64, 600
    weight = torch.randn(v, h, generator=generator) / h**0.5
    best, second = torch.randint(0, v, (2, n), generator=generator)
    towards = weight[best] + 0.9 * weight[second]
    hidden = 30 * towards / (towards * weight[best]).sum(-1, keepdim=True)
    again = hidden * (1 + 0.002 * torch.randn(n, h, generator=generator))
    head = Head(weight.bfloat16(), v - 3, softcap=softcap)
    old, new = (head_logprobs(x.bfloat16(), second.clamp(max=v - 4), head).logps for x in (hidden, again))
    exact = Head(head.weight_WH.float(), v - 3, softcap=softcap)
    wanted = head_logprobs(hidden.bfloat16().float(), second.clamp(max=v - 4), exact).logps
    torch.testing.assert_close(old, wanted, atol=2e-5, rtol=2e-6)
    assert float(((new - old).exp() - 1).abs().max()) < 0.1


def test_the_product_on_a_gpu_has_an_fp32_result() -> None:
    """Shapes and dtypes alone: fake tensors on a device that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device="cuda") for n in (8, 32))
        logprobs._product(hidden, weight, torch.empty(8, 32, device="cuda"))
        with pytest.raises(RuntimeError):
            logprobs._product(hidden, weight, torch.empty(8, 32, dtype=torch.bfloat16, device="cuda"))


def test_values_of_a_bf16_model_keep_fp32_digits() -> None:
    from mrlhf.models.gpt import ValueHead

    config = SimpleNamespace(hidden_size=64, params_dtype=torch.bfloat16, sequence_parallel=False)
    head, hidden = ValueHead(config, None), torch.randn(5, 1, 64).bfloat16().requires_grad_()
    values, _ = head(hidden)
    assert torch.equal(values, hidden.detach().float() @ head.weight.detach().float().T)
    values.sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(scale=1e4)
    logps, entropy, *_ = head_logprobs(hidden, targets, Head(weight, REAL), with_entropy=True)
    assert logps.isfinite().all() and entropy.isfinite().all() and (entropy >= -1e-6).all()
