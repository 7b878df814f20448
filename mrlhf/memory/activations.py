"""What a rank holds between forward and backward, from the same numbers that build the model.

The structure is that of Korthikanti et al. 2022 (arXiv 2205.05198); every term is a tensor that autograd keeps of the layers as gpt.py
builds them: norms, attention, MLPs and experts of Megatron without fused kernels. On CPU the tests hold the sum to what
torch.autograd.graph.saved_tensors_hooks counts. On a GPU it is by counting: torch's RMSNorm then keeps its input and not two fp32 copies,
and half precision goes through flash attention, which keeps queries, keys, values and its output.

Not in it: what the operator at work needs beside (gradients of one layer), buffers of communication, and the allocator's waste.

Legend: T tokens of a micro-batch on this rank (its share under context parallelism), e bytes of an element, L tokens of the longest sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from mrlhf.config.options import ParallelConfig
from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.models.layers.logprobs import CHUNK_BYTES
from mrlhf.parallel.context import head_repeats
from mrlhf.parallel.state import Layout, expert_tensor_parallel_size

_PER_TOKEN = 38  # of the loss: targets, masks, log-probs, what the aggregation keeps


@dataclass(frozen=True)
class Rows:
    """A micro-batch: all its tokens with padding, of which the longest sample has so many; packed they are one row, else `rows` of them."""

    tokens: int
    longest: int
    rows: int = 1
    packed: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes of the fullest pipeline stage. kept: from forward to backward, of all micro-batches in flight; again: of the layer that
    recomputation is at; head: log-probs' buffers and the fp32 gradient of the head's weight."""

    kept: int
    again: int
    head: int

    @property
    def total(self) -> int:
        return self.kept + self.again + self.head


class _Counter:
    """Bytes of one micro-batch, piece by piece."""

    def __init__(self, spec: ModelSpec, parallel: ParallelConfig, rows: Rows, *, element: int, cuda: bool) -> None:
        self.spec, self.e, self.cuda, self.rows = spec, element, cuda, rows
        self.tp, self.cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.tokens = -(-rows.tokens // self.cp)
        self.cut = self.tp if parallel.sequence_parallel else 1  # of norms, residuals and inputs of column-parallel layers
        self.expert_tp = expert_tensor_parallel_size(parallel)
        self.selective = parallel.recompute == "selective"

    def norm(self, width: int) -> float:
        """A token. On CPU RMSNorm works on an fp32 copy and keeps it beside the normalised one."""
        if self.spec.norm == "layer":
            return width * self.e + 2 * (4 if self.cuda else self.e)
        if not self.cuda:
            return 8 * width + 4
        return width * (4 if self.spec.norm == "rms_plus_one" else self.e) + 4

    def layer(self, layer: Layer) -> float:
        """All of it, without recomputation of the whole."""
        spec = self.spec
        norms = 2 * (spec.pre_norm + spec.post_norm) * self.norm(spec.hidden_size)
        inputs = 2 * spec.hidden_size * self.e  # of attention and of MLP or router
        found = (norms + inputs) * self.tokens / self.cut
        found += self.attention(layer) if spec.latent is None else self.latent_attention(layer)
        return found + (self.experts() if layer.moe else self.mlp(spec.ffn_hidden_size / self.tp) * self.tokens)

    def layer_input(self) -> float:
        return self.spec.hidden_size * self.e * self.tokens / self.cut

    def angles(self) -> float:
        """The table that all layers share; without recomputation none of them keeps it."""
        return sum(4 * int(self.spec.rope_dim * rope.fraction) * self.rows.longest for rope in self.spec.ropes)

    def _rope(self, layer: Layer) -> float:
        """Cosines and sines, for queries and for keys; rows of one length share them."""
        if layer.rope is None or not self.spec.ropes:
            return 0.0
        width = int(self.spec.rope_dim * self.spec.ropes[layer.rope].fraction)
        return 4 * width * self.e * self.tokens / self.rows.rows

    def attention(self, layer: Layer) -> float:
        spec, e = self.spec, self.e
        n, g, d = spec.num_attention_heads / self.tp, spec.num_query_groups / self.tp, spec.head_dim
        q, kv = n * d, g * d
        mixed = q + 2 * kv  # of which the values are a view, and keys and queries where nothing has copied them
        found, holds_mixed = 0.0, False
        if spec.qk_norm == "head":
            found += (n + g) * self.norm(d)
            holds_mixed = self.cuda or e == 4
            if holds_mixed:  # the keys' own input is in it, and with a key for every query that of the queries
                found -= (kv + (q if n == g else 0)) * e
        elif spec.qk_norm == "all":
            found += 8 * (q + kv) + 16
        rope = self._rope(layer)
        if self.selective:
            holds_mixed = True
            copied = bool(rope) or spec.qk_norm != "none"
            found += (q * (copied or n != g) + kv * copied + q) * e
        else:
            found += self.core(layer, n, g, d, d)
            holds_mixed |= not self.rows.packed and self._flash(n, g, d, d) and self.cp == 1
            if holds_mixed and not self.rows.packed:  # the values that core counts are those, and what no rope has copied
                found -= (kv + (0 if rope or spec.qk_norm != "none" else kv + q * (n == g))) * e
        return (found + holds_mixed * mixed * e) * self.tokens + rope

    def latent_attention(self, layer: Layer) -> float:
        spec, e, x = self.spec, self.e, self.spec.latent
        assert x is not None
        n, qk = spec.num_attention_heads / self.tp, spec.qk_dim
        local = self.norm(x.kv_rank) + x.kv_rank * e + x.rope_dim * e * (self.cuda or e == 4)
        if x.q_rank is not None:
            local += self.norm(x.q_rank) + x.q_rank * e
        if self.selective:
            found = n * (2 * qk + x.nope_dim + spec.head_dim) * e + n * spec.head_dim * e
        else:
            found = self.core(layer, n, n, qk, spec.head_dim)
            if not self.rows.packed and (self.cuda or e == 4):  # values are a view of what they were made with
                found += n * x.nope_dim * e
        return (local / self.cut + found) * self.tokens + self._rope(layer)

    def _flash(self, n: float, g: float, qk: int, v: int) -> bool:
        """Whether attention keeps no scores: with a softcap it does, on CPU where values are narrower than keys, and on a GPU in fp32 then
        or with fewer keys than queries."""
        if self.spec.attention_softcap is not None:
            return False
        return self.e == 2 or (n == g and qk == v) if self.cuda else qk == v

    def core(self, layer: Layer, n: float, g: float, qk: int, v: int) -> float:
        """A token's part of what attention keeps, and of the input of its output projection."""
        e, length = self.e, self.rows.longest
        if self.cp > 1:  # heads in the place of tokens: few keys are repeated
            g *= head_repeats(int(g), self.cp)
        out = n * v * e
        window = length * length * e / self.tokens if layer.window is not None and layer.window < length else 0.0
        if not self._flash(n, g, qk, v):
            if self.spec.attention_softcap is None:  # torch's own, in fp32
                return n * (2 * qk + v + length) * 4 + out + window
            return n * (2 * qk + v) * e + n * length * (e + 4 + (e if e == 2 else 0)) + out + window
        if self.cuda:
            padded = n * qk * e if v != qk else 0.0  # flash attention wants one width
            window = 0.0 if self.rows.packed else window
            return (n + g) * qk * e + (g * qk if padded else g * v) * e + 4 * n + (padded + out)
        twice = out if self.rows.packed or self.cp > 1 else 0.0  # samples are put together again
        return (n + g) * qk * e + g * v * e + 4 * n + out + twice + window

    def mlp(self, width: float, *, scaled: bool = False) -> float:
        """A token: input of the activation, output, the linear half, product, input of the second layer. scaled: by the router."""
        return ((5 if self.spec.gated else 2) + scaled) * width * self.e

    def experts(self) -> float:
        """Tokens spread evenly over the ranks' experts."""
        x = self.spec.experts
        assert x is not None
        own = self.tokens / self.cut
        router = 9 * x.num + 20 * x.top_k + 4
        chosen = x.top_k * (self.tokens if self.expert_tp > 1 else own)
        each = self.spec.hidden_size * self.e + self.mlp(x.ffn_hidden_size / self.expert_tp, scaled=True) + 4
        return router * own + each * chosen + self.mlp(x.shared_ffn_hidden_size / self.tp) * self.tokens

    def end(self, head: str) -> float:
        """Final norm, and what the head and the loss keep, if every token is trained."""
        own = self.tokens / self.cut
        if head == "value":
            return (self.norm(self.spec.hidden_size) + self.spec.hidden_size * self.e) * own + _PER_TOKEN * self.tokens
        return self.norm(self.spec.hidden_size) * own + (self.spec.hidden_size * self.e + _PER_TOKEN) * self.tokens

    def head_buffers(self) -> float:
        """Two fp32 buffers of a chunk's logits, one of its product in half precision, gradients of hidden states and of the weight."""
        width = self.spec.vocab_size / self.tp
        chunk = min(self.tokens, max(1, CHUNK_BYTES["cuda" if self.cuda else "cpu"] // (4 * max(1, int(width)))))
        half = self.e == 2
        buffers = chunk * width * (8 + half * 2 + 4 * (self.spec.logit_softcap is not None))
        h = self.spec.hidden_size
        return buffers + h * self.e * self.tokens + self.spec.padded_vocab_size / self.tp * h * (4 + half * 2)


def activations(
    spec: ModelSpec,
    parallel: ParallelConfig,
    rows: Rows,
    *,
    dtype: str,
    head: str = "lm",
    micro_batches: int | None = None,
    cuda: bool = True,
) -> Activations:
    """Of one rank in one update. micro_batches: of a rank in a step, where a pipeline may have fewer than it can have in flight."""
    counter = _Counter(spec, parallel, rows, element=4 if dtype == "float32" else 2, cuda=cuda)
    layout = Layout.from_config(parallel, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    stages = layout.stage_of_layers(spec.num_layers)
    full = parallel.recompute == "full"
    found = []
    for stage in range(layout.pp):
        mine = [layer for layer, at in zip(spec.layers, stages, strict=True) if at == stage]
        kept = len(mine) * counter.layer_input() + counter.angles() if full else sum(map(counter.layer, mine))
        again = max(map(counter.layer, mine), default=0.0) if full else 0.0
        last = stage == layout.pp - 1
        # each piece's output waits for its gradient too
        flight = _in_flight(stage, layout, micro_batches)
        kept = flight * (kept + (0 if layout.pp == 1 else layout.virtual_stages * counter.layer_input()))
        ends = counter.end(head) if last else 0.0
        buffers = counter.head_buffers() if last and head == "lm" else 0.0
        found.append(Activations(round(kept + ends), round(again), round(buffers)))
    return max(found, key=lambda one: one.total)


def _in_flight(stage: int, layout: Layout, micro_batches: int | None) -> float:
    """Micro-batches of which a stage holds all its layers' tensors, at most: 1F1B, or interleaved in pieces."""
    pp, pieces = layout.pp, layout.virtual_stages
    if pp == 1:
        return 1.0
    most = pp - stage if pieces == 1 else 2 * (pp - stage - 1) + (pieces - 1) * pp + 1
    return (most if micro_batches is None else min(most, micro_batches * pieces)) / pieces
