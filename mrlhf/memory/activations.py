"""Bytes of the tensors that a rank keeps between forward and backward, from the sizes that build the model.

The structure is that of Korthikanti et al. 2022 (arXiv 2205.05198). Every term is a tensor that autograd keeps of the
layers as gpt.py builds them: norms, attention, MLPs and experts of Megatron without fused kernels. On CPU the tests
compare the sum with what torch.autograd.graph.saved_tensors_hooks counts. The terms for a GPU are counted by hand:
there torch's RMSNorm keeps its input and not two fp32 copies, and half precision goes through flash attention, which
keeps queries, keys, values and its output.

Not counted: temporary tensors of the operator that runs (gradients of one layer), communication buffers, and the
allocator's waste.

Legend: T tokens of a micro-batch on this rank (its part under context parallelism), e bytes of an element, L tokens of
the longest sample, n heads, g key/value heads (query groups), d dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from mrlhf.config.options import ParallelConfig
from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.models.layers.logprobs import CHUNK_BYTES
from mrlhf.parallel.context import head_repeats
from mrlhf.parallel.state import Layout, expert_tensor_parallel_size

_LOSS_BYTES = 38  # per token: targets, masks, log-probs, what the aggregation keeps


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch: its tokens with padding, those of its longest sample, and its rows (one if packed)."""

    tokens: int
    longest: int
    rows: int = 1
    packed: bool = True


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes on the pipeline stage that needs most."""

    kept: int  # from forward to backward, for all micro-batches in flight
    again: int  # of the layer that is being recomputed
    head: int  # buffers of the log-probs and the fp32 gradient of the head's weight

    @property
    def total(self) -> int:
        return self.kept + self.again + self.head


class _ActivationCounter:
    """Bytes of one micro-batch, piece by piece."""

    def __init__(
        self, spec: ModelSpec, parallel: ParallelConfig, shape: MicroBatchShape, *, element: int, cuda: bool
    ) -> None:
        self.spec, self.e, self.cuda, self.shape = spec, element, cuda, shape
        self.tp, self.cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.tokens = -(-shape.tokens // self.cp)
        self.cut = self.tp if parallel.sequence_parallel else 1  # divides norms, residuals and column-parallel inputs
        self.expert_tp = expert_tensor_parallel_size(parallel)
        self.selective = parallel.recompute == "selective"
        self.varlen = cuda and element == 2 and spec.attention_softcap is None  # the kernel of layers/attention.py
        # whether attention copies queries, keys and values first: rows into a line, or samples by their length
        self.gathered = shape.rows > 1 if self.varlen else shape.packed and shape.longest < shape.tokens

    def norm(self, width: int) -> float:
        """Per token. On CPU RMSNorm works on an fp32 copy and keeps it and the normalised one."""
        if self.spec.norm == "layer":
            return width * self.e + 2 * (4 if self.cuda else self.e)
        if not self.cuda:
            return 8 * width + 4
        return width * (4 if self.spec.norm == "rms_plus_one" else self.e) + 4

    def layer(self, layer: Layer) -> float:
        """Bytes of a layer that is not recomputed as a whole."""
        spec = self.spec
        norms = 2 * (spec.pre_norm + spec.post_norm) * self.norm(spec.hidden_size)
        inputs = 2 * spec.hidden_size * self.e  # of attention and of MLP or router
        attention = self.attention(layer) if spec.latent is None else self.latent_attention(layer)
        mlp = self.experts() if layer.moe else self.mlp(spec.ffn_hidden_size / self.tp) * self.tokens
        return (norms + inputs) * self.tokens / self.cut + attention + mlp

    def layer_input(self) -> float:
        return self.spec.hidden_size * self.e * self.tokens / self.cut

    def angles(self) -> float:
        """The table of rotary angles that all layers share; only full recomputation keeps it."""
        positions = self.tokens / self.shape.rows
        return sum(4 * int(self.spec.rope_dim * rope.fraction) * positions for rope in self.spec.ropes)

    def _rope(self, layer: Layer) -> float:
        """Cosines and sines for queries and for keys; rows of one length share them."""
        if layer.rope is None or not self.spec.ropes:
            return 0.0
        width = int(self.spec.rope_dim * self.spec.ropes[layer.rope].fraction)
        return 4 * width * self.e * self.tokens / self.shape.rows

    def attention(self, layer: Layer) -> float:
        spec, e = self.spec, self.e
        n, g, d = spec.num_attention_heads / self.tp, spec.num_query_groups / self.tp, spec.head_dim
        q, kv = n * d, g * d
        # the output of linear_qkv: values are a view of it, and so are keys and queries that nothing has copied
        mixed = q + 2 * kv
        per_token, holds_mixed = 0.0, False
        if spec.qk_norm == "head":
            per_token += (n + g) * self.norm(d)
            holds_mixed = self.cuda or e == 4
            if holds_mixed:  # it contains the input of the keys' norm; if n = g, of the queries' norm too
                per_token -= (kv + (q if n == g else 0)) * e
        elif spec.qk_norm == "all":
            per_token += 8 * (q + kv) + 16
        rope = self._rope(layer)
        copied = bool(rope) or spec.qk_norm != "none"
        if self.selective:
            holds_mixed = True
            per_token += (q * (copied or n != g) + kv * copied + q) * e
        else:
            per_token += self.core(layer, n, g, d, d)
            holds_mixed |= not self.gathered and self.cp == 1
            if holds_mixed and not self.gathered:  # core has counted its values, and what rope has not copied
                per_token -= (kv + (0 if copied else kv + q * (n == g))) * e
        return (per_token + holds_mixed * mixed * e) * self.tokens + rope

    def latent_attention(self, layer: Layer) -> float:
        spec, e, x = self.spec, self.e, self.spec.latent
        assert x is not None
        n, qk = spec.num_attention_heads / self.tp, spec.qk_dim
        local = self.norm(x.kv_rank) + x.kv_rank * e + x.rope_dim * e * (self.cuda or e == 4)
        if x.q_rank is not None:
            local += self.norm(x.q_rank) + x.q_rank * e
        if self.selective:
            heads = n * (2 * qk + x.nope_dim + spec.head_dim) * e + n * spec.head_dim * e
        else:
            heads = self.core(layer, n, n, qk, spec.head_dim)
            if not self.gathered and qk == spec.head_dim and (self.cuda or e == 4):  # a view of linear_kv_up's output
                heads += n * x.nope_dim * e
        return (local / self.cut + heads) * self.tokens + self._rope(layer)

    def core(self, layer: Layer, n: float, g: float, qk: int, v: int) -> float:
        """Per token: what attention keeps, and the input of its output projection. qk, v: widths of a head."""
        e, length = self.e, self.shape.longest
        if self.cp > 1:  # the all-to-all shards heads instead of tokens: too few key heads are repeated
            g *= head_repeats(int(g), self.cp)
        out = n * v * e
        if self.spec.attention_softcap is not None:  # backward computes the rest again
            return (n * qk + g * (qk + v)) * e + out
        if self.cuda and e == 4:
            g = n  # torch's kernel for fp32 knows no groups
        windowed = not self.varlen and layer.window is not None and layer.window < length
        # the kernel's output is of one width with queries; its blocks or samples are put together
        copied = qk != v or (windowed or self.gathered or self.cp > 1) and not self.varlen
        return (n + 2 * g) * qk * e + 4 * n + n * qk * e + (out if copied else 0)

    def mlp(self, width: float, *, scaled: bool = False) -> float:
        """Per token: the activation's input and output, the linear half, the product, the second layer's input.

        scaled: the router's weight multiplies the output.
        """
        return ((5 if self.spec.gated else 2) + scaled) * width * self.e

    def experts(self) -> float:
        """For tokens spread evenly over the experts of all ranks."""
        x = self.spec.experts
        assert x is not None
        own = self.tokens / self.cut
        router = 9 * x.num + 20 * x.top_k + 4
        chosen = x.top_k * (self.tokens if self.expert_tp > 1 else own)
        each = self.spec.hidden_size * self.e + self.mlp(x.ffn_hidden_size / self.expert_tp, scaled=True) + 4
        return router * own + each * chosen + self.mlp(x.shared_ffn_hidden_size / self.tp) * self.tokens

    def end(self, head: str) -> float:
        """Final norm, head and loss, if every token is trained."""
        own = self.tokens / self.cut
        if head == "value":
            # the head's input in fp32
            return (self.norm(self.spec.hidden_size) + self.spec.hidden_size * 4) * own + _LOSS_BYTES * self.tokens
        return self.norm(self.spec.hidden_size) * own + (self.spec.hidden_size * self.e + _LOSS_BYTES) * self.tokens

    def head_buffers(self) -> float:
        """Two fp32 buffers for the logits of a chunk, one in half precision, gradients of hidden states and weight."""
        width = self.spec.vocab_size / self.tp
        chunk = min(self.tokens, max(1, CHUNK_BYTES["cuda" if self.cuda else "cpu"] // (4 * max(1, int(width)))))
        half = self.e == 2
        buffers = chunk * width * (8 + half * 2 + 4 * (self.spec.logit_softcap is not None))
        h = self.spec.hidden_size
        return buffers + h * self.e * self.tokens + self.spec.padded_vocab_size / self.tp * h * (4 + half * 2)


def estimate_activations(spec: ModelSpec, parallel: ParallelConfig, shape: MicroBatchShape, *, dtype: str,
                         head: str = "lm", micro_batches: int | None = None, cuda: bool = True) -> ActivationMemory:
    """Activations of a rank during an update.

    micro_batches: of a rank per step; a pipeline may have fewer than it can have in flight. None: as many as it can.
    """
    counter = _ActivationCounter(spec, parallel, shape, element=4 if dtype == "float32" else 2, cuda=cuda)
    layout = Layout.from_config(parallel, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    stages = layout.stage_of_layers(spec.num_layers)
    full = parallel.recompute == "full"
    by_stage = []
    for stage in range(layout.pp):
        sizes = [counter.layer(layer) for layer, at in zip(spec.layers, stages, strict=True) if at == stage]
        kept = len(sizes) * counter.layer_input() + counter.angles() if full else sum(sizes)
        again = max(sizes, default=0.0) if full else 0.0
        last = stage == layout.pp - 1
        # the output of each virtual stage waits for its gradient too
        outputs = 0 if layout.pp == 1 else layout.virtual_stages * counter.layer_input()
        kept = _in_flight(stage, layout, micro_batches) * (kept + outputs) + (counter.end(head) if last else 0.0)
        buffers = counter.head_buffers() if last and head == "lm" else 0.0
        by_stage.append(ActivationMemory(round(kept), round(again), round(buffers)))
    return max(by_stage, key=lambda memory: memory.total)


def _in_flight(stage: int, layout: Layout, micro_batches: int | None) -> float:
    """The most micro-batches whose tensors a stage holds at once, under 1F1B or interleaved in virtual stages.

    A part of the virtual stages of a micro-batch counts as that fraction of it.
    """
    pp, pieces = layout.pp, layout.virtual_stages
    if pp == 1:
        return 1.0
    most = pp - stage if pieces == 1 else 2 * (pp - stage - 1) + (pieces - 1) * pp + 1
    return (most if micro_batches is None else min(most, micro_batches * pieces)) / pieces
