"""What a model is, apart from how it is spread over ranks.

`families/` fills it; `gpt.py` builds what it says.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mrlhf.config.options import ParallelConfig
from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.models.families.rope_frequencies import Rope

VOCAB_MULTIPLE = 64  # padding of the vocabulary, whatever TP is: checkpoint shapes do not depend on the layout, and vLLM cuts it alike


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    window: int | None = None  # a token sees itself and window - 1 tokens before it; None: all of them
    rope: int | None = 0  # index in ModelSpec.ropes; None: no positions
    moe: bool = False


@dataclass(frozen=True)
class Experts:
    """Of the layers with a mixture of experts: each token goes to `top_k` of `num`, weighted by its scores for them."""

    num: int
    top_k: int
    ffn_hidden_size: int
    renormalise: bool = True  # the weights of the chosen sum to 1; False: their scores as they are
    score: Literal["softmax", "sigmoid"] = "softmax"  # over all experts, or of each by itself
    groups: int = 1  # the experts lie in so many groups, of which a token can choose within `top_groups`
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"  # what the groups are chosen by: the highest score in each, or the sum of two
    weight_scale: float = 1.0
    selection_bias: bool = False  # a number for each expert that is added to the scores for the choice, not for the weights
    shared_ffn_hidden_size: int = 0  # of one more expert, which every token goes to; 0: none


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): the keys and values of all heads are made from one short vector a token.

    A query or key has `nope_dim` dimensions without positions and `rope_dim` that are rotated, the latter of keys common to all heads.
    """

    kv_rank: int
    q_rank: int | None  # of the vector that queries are made from; None: from the hidden states
    nope_dim: int
    rope_dim: int


@dataclass(frozen=True)
class ModelSpec:
    family: str  # config.json's model_type
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of the dense layers
    num_attention_heads: int
    num_query_groups: int
    head_dim: int  # with `latent` of the values, else of queries and keys too
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    tied: bool
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = (Rope(),)
    init_std: float = 0.02
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # rms_plus_one multiplies by 1 + weight; layer: mean, variance, weight, bias
    pre_norm: bool = True  # branch(norm(x)) instead of branch(x)
    post_norm: bool = False  # x + norm(branch) instead of x + branch
    qk_norm: Literal["none", "head", "all"] = "none"  # of queries and keys: over each head, or over all heads together
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True  # fc2(act(gate) * up) instead of fc2(act(fc1))
    attention_scale: float | None = None  # of queries times keys; None: head_dim ** -0.5
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # x + scale * branch
    logit_scale: float = 1.0
    learned_positions: bool = False
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def qk_dim(self) -> int:
        """Of a head's queries and keys."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim

    @property
    def rope_dim(self) -> int:
        """What `ropes` divide into pairs."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    def mlp_parameters(self, ffn: int) -> int:
        up = 2 if self.gated else 1
        return (up + 1) * ffn * self.hidden_size + self.mlp_bias * (up * ffn + self.hidden_size)

    def layer_parameters(self, layer: Layer, *, active: bool = False) -> int:
        """Of one layer; `active`: only the experts that one token uses."""
        found = self._attention_parameters() + 2 * (self.pre_norm + self.post_norm) * self.norm_parameters
        if layer.moe and self.experts is not None:
            e = self.experts
            found += e.num * (self.hidden_size + e.selection_bias) + self.mlp_parameters(e.shared_ffn_hidden_size)
            return found + (e.top_k if active else e.num) * self.mlp_parameters(e.ffn_hidden_size)
        return found + self.mlp_parameters(self.ffn_hidden_size)

    def _attention_parameters(self) -> int:
        h, n = self.hidden_size, self.num_attention_heads
        q, kv, out = n * self.qk_dim, self.num_query_groups * self.head_dim, n * self.head_dim * h
        if self.latent is not None:
            x = self.latent
            queries = h * q if x.q_rank is None else x.q_rank * (h + 1 + q)
            return queries + h * (x.kv_rank + x.rope_dim) + x.kv_rank * (1 + n * (x.nope_dim + self.head_dim)) + out
        found = h * (q + 2 * kv) + out + self.qkv_bias * (q + 2 * kv) + self.output_bias * h
        return found + {"none": 0, "head": 2 * self.head_dim, "all": q + kv}[self.qk_norm]

    @property
    def expert_parameters(self) -> int:
        """Of all experts of all layers."""
        if self.experts is None:
            return 0
        return sum(layer.moe for layer in self.layers) * self.experts.num * self.mlp_parameters(self.experts.ffn_hidden_size)

    @property
    def whole_parameters(self) -> int:
        """Of the matrices in all layers that every tensor-parallel rank has whole: down to the latent vectors."""
        x = self.latent
        return 0 if x is None else self.num_layers * self.hidden_size * ((x.q_rank or 0) + x.kv_rank + x.rope_dim)

    @property
    def end_parameters(self) -> int:
        """Of everything that is in no layer: embeddings, final norm, LM head; without padding rows."""
        rows = self.vocab_size * (1 if self.tied else 2) + self.learned_positions * self.max_position_embeddings
        return rows * self.hidden_size + self.norm_parameters

    @property
    def num_parameters(self) -> int:
        """Of the LM, without padding rows."""
        return sum(map(self.layer_parameters, self.layers)) + self.end_parameters

    def describe(self) -> str:
        """Family and size."""
        text = f"{self.family}, {self.num_parameters:,} parameters"
        if self.experts is not None:
            active = sum(self.layer_parameters(layer, active=True) for layer in self.layers) + self.end_parameters
            text += f" ({active:,} a token: {self.experts.top_k} of {self.experts.num} experts)"
        return text

    def flops_per_token(self, seq_length: float) -> float:
        """Forward + backward of one token in a sequence of this mean length (6 x matmul weights + attention)."""
        weights = sum(self.layer_parameters(layer, active=True) for layer in self.layers) + self.vocab_size * self.hidden_size
        seen = sum(min(seq_length, layer.window or seq_length) for layer in self.layers)
        return 6 * weights + 3 * self.num_attention_heads * (self.qk_dim + self.head_dim) * seen


def read_hf_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError("no config.json", where=str(directory), expected="a HF model directory")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path)) from error


def check_layout(parallel: ParallelConfig, spec: ModelSpec, world: int, *, trained: bool = True) -> list[ConfigError]:
    """What does not divide: the model by TP, PP and EP, the world by TP x PP and EP."""
    tp, pp, found = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, []
    limits = {"num_attention_heads": spec.num_attention_heads, "num_key_value_heads (num_query_groups)": spec.num_query_groups}
    limits |= {"intermediate_size": spec.ffn_hidden_size, "the padded vocabulary's unit": VOCAB_MULTIPLE}
    if spec.experts is not None:
        limits["the shared experts' intermediate size"] = spec.experts.shared_ffn_hidden_size
        if parallel.expert_model_parallel_size == 1:
            limits["the experts' intermediate size"] = spec.experts.ffn_hidden_size
    wrong = [f"{name} = {size}" for name, size in limits.items() if size % tp]
    if wrong:
        good = [n for n in range(1, spec.num_query_groups + 1) if all(size % n == 0 for size in limits.values())]
        found.append(
            ConfigError(
                f"parallel.tensor_model_parallel_size = {tp} does not divide the model's {', '.join(wrong)}",
                where="parallel.tensor_model_parallel_size",
                expected=", ".join(map(str, good)),
                fix=f"--parallel.tensor_model_parallel_size {max(n for n in good if n <= max(tp, 1))}",
            )
        )
    found += _check_pipeline(parallel, spec) + _check_context(parallel, spec)
    smallest = tp * pp * parallel.context_parallel_size
    if world % smallest:
        context = f" x context {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
        found.append(
            ConfigError(
                f"{world} ranks cannot be cut into tensor {tp} x pipeline {pp}{context}",
                where="parallel",
                expected=f"a multiple of {smallest} ranks",
                fix=f"torchrun --nproc-per-node {smallest} -m mrlhf ...",
            )
        )
    return found + _check_experts(parallel, spec, world, trained=trained)


def _check_pipeline(parallel: ParallelConfig, spec: ModelSpec) -> list[ConfigError]:
    """Layers by stages and, interleaved, by the pieces of each."""
    pp, pieces = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1:
        return []
    if first is None and last is None:
        if spec.num_layers % (pp * pieces) == 0:
            return []
        key = "virtual_pipeline_model_parallel_size" if spec.num_layers % pp == 0 else "pipeline_model_parallel_size"
        whole = spec.num_layers // pp if spec.num_layers % pp == 0 else spec.num_layers
        what = f"{spec.num_layers // pp} layers of a stage" if spec.num_layers % pp == 0 else f"num_hidden_layers = {spec.num_layers}"
        return [
            ConfigError(
                f"parallel.{key} = {getattr(parallel, key)} does not divide the model's {what}",
                where=f"parallel.{key}",
                expected=", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0),
            )
        ]
    ends = [n for n in (first, last) if n is not None]
    rest, stages = spec.num_layers - sum(ends), pp - len(ends)
    wrong = rest < 0 or (rest % (stages * pieces) or rest == 0 if stages else rest != 0) or any(n % pieces for n in ends)
    if not wrong:
        return []
    where = "parallel.num_layers_in_first_pipeline_stage" if first is not None else "parallel.num_layers_in_last_pipeline_stage"
    return [
        ConfigError(
            f"{spec.num_layers} layers less those of the {'first and last' if len(ends) == 2 else 'uneven'} stage leave {rest} for {stages} stages"
            + (f" of {pieces} pieces" if pieces > 1 else ""),
            where=where,
            expected="whole, equal stages (and pieces)",
        )
    ]


def _check_context(parallel: ParallelConfig, spec: ModelSpec) -> list[ConfigError]:
    """In attention context-parallel ranks share the heads that a tensor-parallel rank has; key/value heads may be repeated for it."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads, groups = spec.num_attention_heads // tp, spec.num_query_groups // tp
    if spec.num_attention_heads % tp or spec.num_query_groups % tp:
        return []
    good = [n for n in range(1, heads + 1) if heads % n == 0 and heads // groups % (n // math.gcd(groups, n)) == 0]
    if cp in good:
        return []
    return [
        ConfigError(
            f"parallel.context_parallel_size = {cp} does not divide the {heads} heads (and {groups} key/value heads) of a tensor-parallel rank",
            where="parallel.context_parallel_size",
            expected=", ".join(map(str, good)),
            fix=f"--parallel.context_parallel_size {max(n for n in good if n <= max(cp, 1))}",
        )
    ]


def _check_experts(parallel: ParallelConfig, spec: ModelSpec, world: int, *, trained: bool) -> list[ConfigError]:
    tp, pp, ep, where = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
        "parallel.expert_model_parallel_size",
    )
    if spec.experts is None:
        what = f"{where} = {ep}, and the model ({spec.family}) has no experts"
        return [ConfigError(what, where=where, expected="1", fix=f"--{where} 1")] if ep > 1 and trained else []
    found = []
    if spec.experts.num % ep or world // pp % ep:
        good = [n for n in range(1, spec.experts.num + 1) if spec.experts.num % n == 0 and max(1, world // pp) % n == 0]
        what = f"{where} = {ep} does not divide the model's {spec.experts.num} experts and the {world // pp} ranks of a pipeline stage"
        found.append(ConfigError(what, where=where, expected=", ".join(map(str, good)), fix=f"--{where} {max(n for n in good if n <= ep)}"))
    if trained and tp > 1 and not parallel.sequence_parallel:
        found.append(
            ConfigError(
                "megatron-core trains experts under tensor parallelism with sequence parallelism only",
                where="parallel.sequence_parallel",
                expected="true",
                fix="--parallel.sequence_parallel true",
            )
        )
    return found
