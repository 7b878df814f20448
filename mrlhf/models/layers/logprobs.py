"""Log-probabilities and entropy straight from hidden states, through a vocabulary-parallel LM head, in fp32.

Legend: N tokens (all leading dimensions), H hidden size, V vocabulary, W = V / TP rows of the head on this rank, R real
rows of W. [N, V] logits are never whole: both passes go through the tokens in chunks. Forward keeps two numbers a
token. Backward multiplies by the head once more (4 matrix products instead of 3) and accumulates both gradients, so the
memory beyond them is two buffers of chunk x W floats. If one chunk holds all tokens, its logits are kept for backward,
which saves the fourth product. Forward has two collectives and backward one, whatever N is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

# Size of one fp32 [chunk, W] buffer. With fewer than some hundred tokens a chunk a GPU mostly reads the head.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_TILE_BYTES = 8 << 20  # fp32 rows of a half-precision head at a time, on CPU


@dataclass(frozen=True)
class Head:
    """Logits are softcap * tanh(scale * h @ weight.T / softcap), without a softcap scale * h @ weight.T."""

    weight_WH: torch.Tensor  # this rank's rows; those beyond vocab_size are padding, with probability 0
    vocab_size: int
    group: dist.ProcessGroup | None = None  # tensor-parallel
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., W], all at once: for comparisons, not for training."""
        logits = hidden @ self.weight_WH.T * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TargetLogProbs(NamedTuple):
    """fp32 and differentiable, except `is_top`; all in the shape of the targets."""

    logps: torch.Tensor
    entropy: torch.Tensor  # of the whole distribution; zeros unless `with_entropy`
    is_top: torch.Tensor  # bool: no token is more likely
    log_z: torch.Tensor  # log of the sum of exp(logit / temperature), which a z-loss keeps near 0


def _product(hidden_CH: torch.Tensor, weight_RH: torch.Tensor, out_CR: torch.Tensor) -> None:
    """hidden @ weight.T in fp32, accumulation and result, whatever the dtype of the two.

    Rounded to bf16, logits near 30 come in steps of 1/8: two passes that differ by rounding then disagree about a
    token's probability by 13 % and more.
    """
    if hidden_CH.dtype == torch.float32:
        torch.mm(hidden_CH, weight_RH.T, out=out_CR)
    elif hidden_CH.is_cuda:
        torch.mm(hidden_CH, weight_RH.T, out_dtype=torch.float32, out=out_CR)
    else:  # CPU kernels round their result to the dtype of their inputs
        hidden_CH, rows = hidden_CH.float(), max(1, _TILE_BYTES // (4 * weight_RH.size(1)))
        for i in range(0, weight_RH.size(0), rows):
            torch.mm(hidden_CH, weight_RH[i : i + rows].float().T, out=out_CR[:, i : i + rows])


class _Chunks:
    """z = logits / temperature of a chunk of tokens, in one buffer (fresh memory costs page faults on CPU)."""

    def __init__(self, hidden_NH: torch.Tensor, weight_RH: torch.Tensor, head: Head, temperature: float) -> None:
        self.hidden_NH, self.weight_RH = hidden_NH, weight_RH
        self.scale, self.softcap, self.temperature = head.scale, head.softcap, temperature
        n, r = hidden_NH.size(0), weight_RH.size(0)
        size = max(1, min(n, CHUNK_BYTES[hidden_NH.device.type] // (4 * max(1, r))))
        self.slices = [slice(i, min(i + size, n)) for i in range(0, n, size)] if r else []
        self.z_CR, self.other_CR = (hidden_NH.new_empty(size, r, dtype=torch.float32) for _ in range(2))

    def z(self, c: slice) -> torch.Tensor:
        """[chunk, R], a view of the shared buffer; the caller may edit it in place."""
        hidden_CH = self.hidden_NH[c]
        z_CR = self.z_CR[: hidden_CH.size(0)]
        _product(hidden_CH, self.weight_RH, z_CR)
        if self.softcap is not None:
            return z_CR.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z_CR if self.scale == self.temperature else z_CR.mul_(self.scale / self.temperature)

    def other(self, c: slice) -> torch.Tensor:
        return self.other_CR[: c.stop - c.start]

    def grad_product(self, grad_z_CR: torch.Tensor, z_CR: torch.Tensor | None) -> torch.Tensor:
        """Turns the gradient of z into that of hidden @ weight.T, in place. z_CR: needed with a softcap."""
        grad_z_CR.mul_(self.scale / self.temperature)
        if self.softcap is not None:
            assert z_CR is not None
            grad_z_CR.mul_(1 - (z_CR * (self.temperature / self.softcap)).square_())
        return grad_z_CR


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_WH, targets_N, head, temperature, with_entropy):
        n, w = hidden_NH.size(0), weight_WH.size(0)
        group = head.group
        start = 0 if group is None else group.rank() * w
        real = max(0, min(w, head.vocab_size - start))
        local_N = targets_N - start
        mine_N = (local_N >= 0) & (local_N < real)
        local_N = local_N.clamp(0, max(real - 1, 0))
        chunks = _Chunks(hidden_NH, weight_WH[:real], head, temperature)
        # Sums over this rank's rows, with z = logit / temperature - its own maximum: exp(z), exp(z) z; and the target's
        # logit / temperature.
        max_N = own_N = torch.full((n,), float("-inf"), device=hidden_NH.device)
        sums_3N = torch.zeros(3, n, dtype=torch.float32, device=hidden_NH.device)
        for c in chunks.slices:
            z_CR = chunks.z(c)
            sums_3N[2, c] = torch.where(mine_N[c], z_CR.gather(1, local_N[c, None]).squeeze(1), 0.0)
            max_N[c] = z_CR.amax(-1)
            z_CR.sub_(max_N[c, None])
            e_CR = torch.exp(z_CR, out=chunks.other(c))
            sums_3N[0, c] = e_CR.sum(-1)
            if with_entropy:
                sums_3N[1, c] = torch.bmm(e_CR[:, None], z_CR[:, :, None]).reshape(-1)
        if group is not None:
            own_N = max_N.clone()
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=group)
            # exp(-1e4) is 0; the -inf of a rank without real rows would give nan
            shift_N = (own_N - max_N).clamp(min=-1e4)
            sums_3N[1] = (sums_3N[1] + shift_N * sums_3N[0]) * shift_N.exp()
            sums_3N[0] *= shift_N.exp()
            dist.all_reduce(sums_3N, group=group)
        log_z_N = max_N + sums_3N[0].log()
        logps_N = sums_3N[2] - log_z_N
        entropy_N = sums_3N[0].log() - sums_3N[1] / sums_3N[0] if with_entropy else torch.zeros_like(logps_N)
        ctx.save_for_backward(hidden_NH, weight_WH, local_N, mine_N, log_z_N, entropy_N)
        ctx.head, ctx.temperature, ctx.real = head, temperature, real
        ctx.kept = (chunks, own_N) if len(chunks.slices) == 1 and any(ctx.needs_input_grad[:2]) else None
        ctx.set_materialize_grads(False)
        is_top_N = sums_3N[2] == max_N
        ctx.mark_non_differentiable(is_top_N, *(() if with_entropy else (entropy_N,)))
        return logps_N, entropy_N, is_top_N, log_z_N.clone()

    @staticmethod
    def backward(ctx, grad_logps_N, grad_entropy_N, _, grad_log_z_N):
        hidden_NH, weight_WH, local_N, mine_N, log_z_N, entropy_N = ctx.saved_tensors
        weight_RH = weight_WH[: ctx.real]
        if grad_logps_N is None:
            grad_logps_N = torch.zeros_like(log_z_N)
        of_p_N = grad_logps_N if grad_log_z_N is None else grad_logps_N - grad_log_z_N
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        # fp32 over the chunks: bf16 would round at every addition
        grad_weight_WH = torch.zeros_like(weight_WH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunks, own_N = ctx.kept or (_Chunks(hidden_NH, weight_RH, ctx.head, ctx.temperature), None)
        ctx.kept = None
        for c in chunks.slices:
            z_CR = chunks.z(c) if own_N is None else chunks.z_CR.add_(own_N[:, None])
            capped_CR = z_CR.clone() if ctx.head.softcap is not None else None
            logp_CR = z_CR.sub_(log_z_N[c, None])
            g_CR = torch.exp(logp_CR, out=chunks.other(c))
            # d logp[target] / dz = onehot - p ;  d H / dz = -p (logp + H) ;  d log sum exp / dz = p
            if grad_entropy_N is None:
                g_CR.mul_(-of_p_N[c, None])
            else:
                of_entropy_C1 = grad_entropy_N[c, None]
                g_CR.mul_(logp_CR.mul_(-of_entropy_C1).sub_(of_entropy_C1 * entropy_N[c, None] + of_p_N[c, None]))
            g_CR.scatter_add_(1, local_N[c, None], torch.where(mine_N[c], grad_logps_N[c], 0.0)[:, None])
            g_CR = chunks.grad_product(g_CR, capped_CR).to(hidden_NH.dtype)
            torch.mm(g_CR, weight_RH, out=grad_hidden_NH[c])
            if grad_weight_WH is None:
                continue
            if g_CR.dtype == torch.float32:
                grad_weight_WH[: ctx.real].addmm_(g_CR.T, hidden_NH[c])
            else:
                grad_weight_WH[: ctx.real].add_(g_CR.T @ hidden_NH[c])
        if ctx.head.group is not None:
            dist.all_reduce(grad_hidden_NH, group=ctx.head.group)
        grad_weight = None if grad_weight_WH is None else grad_weight_WH.to(weight_WH.dtype)
        return grad_hidden_NH, grad_weight, None, None, None, None


def head_logprobs(hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, temperature: float = 1.0,
                  with_entropy: bool = False, keep: torch.Tensor | None = None) -> TargetLogProbs:
    """Log-probs under softmax(logits / temperature) at every target.

    hidden: [..., H], whole on every tensor-parallel rank. targets: [...], token ids.
    keep: [...], equal on all ranks; where it is 0 nothing is computed and 0 is returned (prompts cost nothing).
    The gradient of `hidden` is whole on every rank; that of the head covers this rank's rows.
    """
    assert hidden.shape[:-1] == targets.shape, (hidden.shape, targets.shape)
    hidden_NH, targets_N, index = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1), None
    if keep is not None:
        index = keep.reshape(-1).nonzero().squeeze(1)
        hidden_NH, targets_N = hidden_NH.index_select(0, index), targets_N.index_select(0, index)
    if head.group is not None and head.group.size() == 1:
        head = replace(head, group=None)
    fields = _HeadLogProbs.apply(hidden_NH, head.weight_WH, targets_N, head, temperature, with_entropy)
    if index is not None:
        fields = tuple(x.new_zeros(targets.numel()).index_copy(0, index, x) for x in fields)
    return TargetLogProbs(*(x.view(targets.shape) for x in fields))
