"""Bytes that a rank needs beside its model in an update: what autograd keeps between forward and backward, and what
operations make and drop again at the moments that need most.

The structure is that of Korthikanti et al. 2022 (arXiv 2205.05198). Every term is a tensor of the layers as gpt.py
builds them: norms, attention, MLPs and experts of Megatron without fused kernels. tests/memory/test_activations.py
counts on the CPU what autograd keeps; tests/cuda/test_memory.py rehearses whole steps for a GPU, where RMSNorm keeps
its input and not two fp32 copies, and half precision goes through the varlen kernel.

An update needs most in the backward of the head, in a layer (its backward; with experts also its forward), or where the
embedding's gradient is made. Adam's kernel and the gradient norm make no tensors of the size of the parameters.

Not counted: what kernels allocate inside, NCCL's and CUDA's own memory, and the allocator's fragments.

Legend: T tokens of a micro-batch on this rank (its part under context parallelism), e bytes of an element, L tokens of
the longest sample, n heads, g key/value heads (query groups), d dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from mrlhf.config.options import ParallelConfig
from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.models.layers.attention import BLOCK, SCORE_BYTES
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
    """Bytes of one pipeline stage beside its model, at the moment of an update when it needs most."""

    moment: str
    kept: int  # from forward to backward, for all micro-batches in flight
    again: int = 0  # of the layer that is being recomputed
    work: int = 0  # what the operations of that moment make, and buffers of collectives

    @property
    def total(self) -> int:
        return self.kept + self.again + self.work


class _ActivationCounter:
    """Bytes of one micro-batch, piece by piece."""

    def __init__(
        self, spec: ModelSpec, parallel: ParallelConfig, shape: MicroBatchShape, *, element: int, cuda: bool
    ) -> None:
        self.spec, self.e, self.cuda, self.shape = spec, element, cuda, shape
        self.tp, self.cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        self.tokens = -(-shape.tokens // self.cp)
        self.cut = self.tp if parallel.sequence_parallel else 1  # divides norms, residuals and column-parallel inputs
        self.expert_tp, self.expert_ranks = expert_tensor_parallel_size(parallel), parallel.expert_model_parallel_size
        self.selective = parallel.recompute == "selective"
        self.varlen = cuda and element == 2 and spec.attention_softcap is None  # the kernel of layers/attention.py
        # whether other kernels get the samples of a pack by their length
        self.gathered = shape.packed and shape.longest < shape.tokens and shape.tokens % shape.longest > 0

    def norm(self, width: int) -> float:
        """Per token. On CPU RMSNorm works on an fp32 copy and keeps it and the normalised one."""
        if self.spec.norm == "layer":
            return width * self.e + 2 * (4 if self.cuda else self.e)
        if not self.cuda:
            return 8 * width + 4
        return width * (4 if self.spec.norm == "rms_plus_one" else self.e) + 4

    def layer(self, layer: Layer) -> float:
        """Bytes of a layer that is not recomputed as a whole."""
        attention = self.attention(layer) if self.spec.latent is None else self.latent_attention(layer)
        return self._branch_input() + attention + self._second_branch(layer)

    def _branch_input(self) -> float:
        """The input of attention, or that of MLP or router, and the norms of that branch."""
        spec = self.spec
        norms = (spec.pre_norm + spec.post_norm) * self.norm(spec.hidden_size)
        return (norms + spec.hidden_size * self.e) * self.tokens / self.cut

    def _second_branch(self, layer: Layer) -> float:
        mlp = self.experts() if layer.moe else self.mlp(self.spec.ffn_hidden_size / self.tp) * self.tokens
        return self._branch_input() + mlp

    def layer_input(self) -> float:
        return self.spec.hidden_size * self.e * self.tokens / self.cut

    def angles(self) -> float:
        """The table of rotary angles that all layers share; only full recomputation keeps it."""
        tokens = self.tokens / self.shape.rows
        return sum(4 * int(self.spec.rope_dim * rope.fraction) * tokens for rope in self.spec.ropes)

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
        return (local / self.cut + heads) * self.tokens + self._rope(layer)

    def core(self, layer: Layer, n: float, g: float, qk: int, v: int) -> float:
        """Per token: queries, keys and values, what attention keeps, and the input of its output projection.

        qk, v: widths of a head. Kernels want one width, so narrower values are padded, and the output is cut.
        """
        e = self.e
        if self.cp > 1:  # the all-to-all shards heads instead of tokens: too few key heads are repeated
            g *= head_repeats(int(g), self.cp)
        out = n * v * e
        if self.spec.attention_softcap is not None:  # backward computes the rest again
            return (n * qk + g * (qk + v)) * e + out * (1 + (self.cp > 1))
        windowed = layer.window is not None and layer.window < self.shape.longest
        if self.varlen:
            qk = -(-qk // 8) * 8
        elif self.cuda:
            g = n  # torch's kernel for fp32 knows no groups
        # the kernel's output is of one width with queries; its blocks, samples or heads are put together
        copied = qk != v or self.cp > 1 or (windowed or self.gathered) and not self.varlen
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

    # what operations make and drop again, at the moments that need most

    def head_work(self, head: str) -> float:
        """Backward of the head. LM: two fp32 buffers for the logits of a chunk, one in half precision, gradients of
        hidden states and weight. Value head: the gradient of its fp32 input.
        """
        h = self.spec.hidden_size
        if head == "value":
            return 4 * h * self.tokens / self.cut
        width = self.spec.vocab_size / self.tp
        chunk = min(self.tokens, max(1, CHUNK_BYTES["cuda" if self.cuda else "cpu"] // (4 * max(1, int(width)))))
        half, logits, weight = self.e == 2, chunk * width, self.vocabulary() / self.e
        products = logits * (8 + half * 2) + weight * (4 + half * 2)
        if self.spec.logit_softcap is not None:  # a copy of the capped logits, and two more for the cap's derivative
            products = max(products + logits * 4, logits * 20 + weight * 4)
        return products + h * self.e * self.tokens

    def vocabulary(self) -> float:
        """Bytes of this rank's rows of embedding or head."""
        return self.spec.padded_vocab_size / self.tp * self.spec.hidden_size * self.e

    def layer_work(self, layer: Layer) -> float:
        """Beside all that the layer keeps, at its worst moment."""
        gradient = self.layer_input()  # of the residual
        if layer.moe:
            return max(self._experts_forward(), gradient + self._experts_backward())
        width = self.spec.ffn_hidden_size / self.tp
        inner, whole = width * self.e * self.tokens, self.layer_input() * self.cut
        # the second matrix: gradients of its input and of itself; sequence parallelism gathers that of its output
        second = inner + self.spec.hidden_size * width * self.e + (whole if self.cut > 1 else 0.0)
        # the activation of a gated MLP: gradients of both factors, and that of the product
        mlp = max(second, 2 * inner * self.spec.gated)
        return gradient + max(mlp, self._softcap_backward() - self._second_branch(layer))

    def _softcap_backward(self) -> float:
        """A block of scores, computed again: as tanh, as weights in fp32, the gradients of both in fp32, and two masks;
        the gradients of queries, keys and values.
        """
        spec = self.spec
        if spec.attention_softcap is None:
            return 0.0
        n, g = spec.num_attention_heads / self.tp / self.cp, spec.num_query_groups / self.tp
        most = SCORE_BYTES["cuda" if self.cuda else "cpu"]
        block = min(most, 4 * n * min(BLOCK, self.shape.longest) * self.shape.tokens)
        heads = (3 * n * self.e + 2 * g * (4 + self.e)) * spec.head_dim * self.shape.tokens
        return block * (3 + self.e / 4 + 2 / (4 * n)) + heads

    def _experts_forward(self) -> float:
        """Permuted tokens, those from other ranks, the experts' outputs, and the same in the order of the tokens."""
        x = self.spec.experts
        assert x is not None
        own = self.tokens / self.cut * x.top_k * self.spec.hidden_size
        if self.expert_tp == 1:
            return 4 * own * self.e
        # every rank has all tokens; sums over the ranks are made in fp32
        return own * self.expert_tp * (2 * self.e + 4) + own * (self.e + 4)

    def _experts_backward(self) -> float:
        """The last expert: its output is weighted in fp32, so its gradients of both factors are fp32."""
        x = self.spec.experts
        assert x is not None
        local = x.num / self.expert_ranks
        chosen = x.top_k * (self.tokens if self.expert_tp > 1 else self.tokens / self.cut)
        inner = chosen / local * x.ffn_hidden_size / self.expert_tp
        return inner * (3 * 4) + chosen * self.spec.hidden_size * self.e


def stage_activations(spec: ModelSpec, parallel: ParallelConfig, shape: MicroBatchShape, *, dtype: str,
                      head: str = "lm", micro_batches: int | None = None,
                      cuda: bool = True) -> list[list[ActivationMemory]]:
    """For each pipeline stage the moments of an update that may need most.

    micro_batches: of a rank per step; a pipeline may have fewer than it can have in flight. None: as many as it can.
    """
    count = _ActivationCounter(spec, parallel, shape, element=4 if dtype == "float32" else 2, cuda=cuda)
    layout = Layout.from_config(parallel, parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    stages = layout.stage_of_layers(spec.num_layers)
    full = parallel.recompute == "full"
    return [
        _moments(count, [layer for layer, at in zip(spec.layers, stages, strict=True) if at == stage], layout, stage,
                 head=head, full=full, in_flight=_in_flight(stage, layout, micro_batches))
        for stage in range(layout.pp)
    ]


def _moments(count: _ActivationCounter, layers: list[Layer], layout: Layout, stage: int, *, head: str, full: bool,
             in_flight: float) -> list[ActivationMemory]:
    last, tied = stage == layout.pp - 1, count.spec.tied and head == "lm" and layout.pp == 1
    sizes = [count.layer(layer) for layer in layers]
    one = len(sizes) * count.layer_input() + count.angles() if full else sum(sizes)
    # the output of each virtual stage waits for its gradient too
    one += 0 if layout.pp == 1 else layout.virtual_stages * count.layer_input()
    waiting = (layout.pp > 2) + 2 * (layout.virtual_stages > 1)  # messages of other micro-batches
    kept, vocabulary = in_flight * one + waiting * count.layer_input(), count.vocabulary()
    buffer = count.layer_input() * count.cut if count.cut > 1 else 0.0  # of sequence parallelism's all-gathers
    # the head's part of the gradient of a tied matrix waits for that of the embedding
    work = max(map(count.layer_work, layers), default=0.0) + tied * vocabulary + buffer
    moments = [("a layer", kept, max(sizes, default=0.0) if full else 0.0, work)]
    if last:
        moments.append(("the head", kept + count.end(head), 0.0, count.head_work(head) + buffer))
    if stage == 0:
        work = count.layer_input() + vocabulary * (1 + 2 * tied) + buffer
        moments.append(("the embedding", max(0.0, kept - one), 0.0, work))
    return [ActivationMemory(name, *map(round, sizes)) for name, *sizes in moments]


def _in_flight(stage: int, layout: Layout, micro_batches: int | None) -> float:
    """The most micro-batches whose tensors a stage holds at once, under 1F1B or interleaved in virtual stages.

    A part of the virtual stages of a micro-batch counts as that fraction of it.
    """
    pp, pieces = layout.pp, layout.virtual_stages
    if pp == 1:
        return 1.0
    most = pp - stage if pieces == 1 else 2 * (pp - stage - 1) + (pieces - 1) * pp + 1
    return (most if micro_batches is None else min(most, micro_batches * pieces)) / pieces
