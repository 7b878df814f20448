"""Log-probabilities and entropy from vocabulary-parallel logits, in one pass, in fp32.

Legend: N tokens (all leading dimensions), V vocabulary, W = V / TP the part of this rank.
Forward keeps the logits as they came (bf16 or fp32) and two numbers a token; backward recomputes the
probabilities. Both go through the tokens in chunks, so the extra memory is chunk x W floats, never a second
[N, W]. Two collectives whatever N is.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

CHUNK_BYTES = 64 << 20  # of one fp32 [chunk, W] temporary


def _chunks(n: int, w: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * w))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NW, targets_N, temperature, with_entropy, group, rank, vocab_size):
        n, w = logits_NW.shape
        start = rank * w
        real = min(w, vocab_size - start)  # columns beyond are padding rows of the embedding: probability 0
        local_N = targets_N - start
        mine_N = (local_N >= 0) & (local_N < real)
        local_N = local_N.clamp(0, w - 1)
        if real > 0:
            max_N = logits_NW[:, :real].amax(-1).float() / temperature
        else:
            max_N = torch.full((n,), float("-inf"), device=logits_NW.device)
        if group is not None:
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=group)
        # sums over this rank's part of: exp(z), the target's z, exp(z) * z, with z = logit / temperature - max
        sums_3N = torch.zeros(3, n, dtype=torch.float32, device=logits_NW.device)
        for c in _chunks(n, w) if real > 0 else []:
            z = (logits_NW[c, :real].float() / temperature).sub_(max_N[c, None])  # .float() of fp32 is no copy, the division is
            sums_3N[1, c] = torch.where(mine_N[c], z.gather(1, local_N[c, None].clamp(max=real - 1)).squeeze(1), 0.0)
            e = z.exp()
            sums_3N[0, c] = e.sum(-1)
            if with_entropy:
                sums_3N[2, c] = e.mul_(z).sum(-1)
        if group is not None:
            dist.all_reduce(sums_3N, group=group)
        log_sum_N = sums_3N[0].log()
        logps_N = sums_3N[1] - log_sum_N
        entropy_N = log_sum_N - sums_3N[2] / sums_3N[0] if with_entropy else torch.zeros_like(logps_N)
        ctx.save_for_backward(logits_NW, local_N, mine_N, max_N + log_sum_N, entropy_N)
        ctx.temperature, ctx.real = temperature, real
        ctx.set_materialize_grads(False)
        is_top_N = sums_3N[1] == 0  # the target's z is 0 just where it is the maximum
        ctx.mark_non_differentiable(is_top_N, *(() if with_entropy else (entropy_N,)))
        return logps_N, entropy_N, is_top_N

    @staticmethod
    def backward(ctx, grad_logps_N, grad_entropy_N, _):
        logits_NW, local_N, mine_N, log_z_N, entropy_N = ctx.saved_tensors
        grad_NW = torch.zeros_like(logits_NW)
        for c in _chunks(*logits_NW.shape) if ctx.real > 0 else []:
            logp = (logits_NW[c, : ctx.real].float() / ctx.temperature).sub_(log_z_N[c, None])
            p = logp.exp()
            # d logp[target] / d z = onehot - p ;  d H / d z = -p (logp + H)
            g = torch.zeros_like(p) if grad_logps_N is None else p * -grad_logps_N[c, None]
            if grad_logps_N is not None:
                g.scatter_add_(1, local_N[c, None].clamp(max=ctx.real - 1), torch.where(mine_N[c], grad_logps_N[c], 0.0)[:, None])
            if grad_entropy_N is not None:
                g.sub_(p.mul_(logp.add_(entropy_N[c, None])).mul_(grad_entropy_N[c, None]))
            grad_NW[c, : ctx.real] = g.div_(ctx.temperature).to(grad_NW.dtype)
        return grad_NW, None, None, None, None, None, None


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(target) and the entropy of softmax(logits / temperature), fp32 and differentiable, and whether the target is the most likely token.

    logits [..., V/TP] of this rank, targets [...] global ids, vocab_size the count of real rows (logits beyond
    it get probability 0), group the tensor-parallel group. The entropy is zeros unless asked for.
    The gradient of the logits is that of this rank's part.
    """
    if group is not None and group.size() == 1:
        group = None
    assert logits.shape[:-1] == targets.shape, (logits.shape, targets.shape)
    found = _VocabParallelLogProbs.apply(
        logits.reshape(-1, logits.size(-1)),
        targets.reshape(-1),
        temperature,
        with_entropy,
        group,
        0 if group is None else group.rank(),
        vocab_size,
    )
    logps, entropy, is_top = (x.view(targets.shape) for x in found)
    return logps, entropy, is_top
