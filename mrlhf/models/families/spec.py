"""ModelSpec: the architecture of a model, independent of the parallel layout. A family fills it in, `gpt.py` builds it.

`check_layout` says which parallel sizes a model allows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mrlhf.config.foreign import read_json
from mrlhf.config.options import ParallelConfig
from mrlhf.errors import CheckpointError, ConfigError, MrlhfError
from mrlhf.models.families.rope_frequencies import Positive, Rope

# The vocabulary is padded to a multiple of this for every TP: checkpoint shapes do not depend on the layout, and vLLM's
# shards are the same.
VOCAB_MULTIPLE = 64
# Beyond these a config.json is damaged or hostile; a list of all its tensors would fill the memory.
MAX_LAYERS, _MAX_EXPERTS = 1024, 1 << 18  # the latter in all layers
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Length = Annotated[int, Meta(ge=1, le=1 << 40)]  # in tokens
Scale = Annotated[float, Meta(ge=-1e9, le=1e9)]  # false for nan


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    window: Length | None = None  # a token attends to itself and window - 1 tokens before it; None: to all before it
    rope: int | None = 0  # index in ModelSpec.ropes; None: no positions
    moe: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes to `top_k` of `num` experts, weighted by its scores for them."""

    num: Size
    top_k: Size
    ffn_hidden_size: Size
    renormalise: bool = True  # the weights of the chosen experts sum to 1; False: the weights are the scores
    score: Literal["softmax", "sigmoid"] = "softmax"  # over all experts, or for each expert alone
    groups: Size = 1  # groups of experts; a token chooses experts within its `top_groups` best groups
    top_groups: Size = 1
    group_score: Literal["best", "best_two"] = "best"  # a group's score: its highest, or the sum of its two highest
    weight_scale: Scale = 1.0
    selection_bias: bool = False  # a number per expert, added to the scores for the choice but not for the weights
    shared_ffn_hidden_size: Annotated[int, Meta(ge=0, le=1 << 24)] = 0  # of an expert for every token; 0: none


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): a short vector per token gives the keys and values.

    A query or key has `nope_dim` dimensions without positions and `rope_dim` rotated ones; all heads share the rotated
    dimensions of the keys.
    """

    kv_rank: Size
    q_rank: Size | None  # size of the vector that gives the queries; None: the hidden states give them
    nope_dim: Size
    rope_dim: Size


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and architecture of a model. The defaults are Llama's."""

    family: str  # config.json's model_type
    num_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    hidden_size: Size
    ffn_hidden_size: Size  # in dense layers
    num_attention_heads: Size
    num_query_groups: Size
    head_dim: Size  # of values and, without `latent`, of queries and keys
    vocab_size: Size
    max_position_embeddings: Length
    norm_eps: Annotated[float, Meta(ge=0, le=1)]
    tied: bool
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = (Rope(),)
    init_std: Annotated[float, Meta(ge=0, le=10)] = 0.02
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # rms_plus_one: times 1 + weight; layer: LayerNorm with bias
    pre_norm: bool = True  # branch(norm(x)) instead of branch(x)
    post_norm: bool = False  # x + norm(branch) instead of x + branch
    qk_norm: Literal["none", "head", "all"] = "none"  # norm of queries and keys: per head, or over all heads
    qkv_bias: bool = False
    output_bias: bool = False  # in attention's output projection
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True  # fc2(act(gate) * up) instead of fc2(act(fc1))
    attention_scale: Scale | None = None  # factor for queries times keys; None: head_dim ** -0.5
    attention_softcap: Positive | None = None  # cap * tanh(scores / cap)
    logit_softcap: Positive | None = None
    embedding_scale: Scale = 1.0
    residual_scale: Scale = 1.0  # x + scale * branch
    logit_scale: Scale = 1.0
    learned_positions: bool = False
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def qk_dim(self) -> int:
        """Dimensions of a query or key in one head."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a query or key that `ropes` apply to."""
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
        """Parameters of one layer. active: count only the experts that one token uses."""
        count = self._attention_parameters() + 2 * (self.pre_norm + self.post_norm) * self.norm_parameters
        if layer.moe and self.experts is not None:
            e = self.experts
            count += e.num * (self.hidden_size + e.selection_bias) + self.mlp_parameters(e.shared_ffn_hidden_size)
            return count + (e.top_k if active else e.num) * self.mlp_parameters(e.ffn_hidden_size)
        return count + self.mlp_parameters(self.ffn_hidden_size)

    def _attention_parameters(self) -> int:
        h, n = self.hidden_size, self.num_attention_heads
        q, kv, out = n * self.qk_dim, self.num_query_groups * self.head_dim, n * self.head_dim * h
        if self.latent is not None:
            x = self.latent
            queries = h * q if x.q_rank is None else x.q_rank * (h + 1 + q)
            return queries + h * (x.kv_rank + x.rope_dim) + x.kv_rank * (1 + n * (x.nope_dim + self.head_dim)) + out
        norms = {"none": 0, "head": 2 * self.head_dim, "all": q + kv}[self.qk_norm]
        return h * (q + 2 * kv) + out + self.qkv_bias * (q + 2 * kv) + self.output_bias * h + norms

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts in all layers, without shared ones."""
        if self.experts is None:
            return 0
        num_layers = sum(layer.moe for layer in self.layers)
        return num_layers * self.experts.num * self.mlp_parameters(self.experts.ffn_hidden_size)

    def whole_parameters(self, layer: Layer) -> int:
        """Parameters of one layer that tensor parallelism does not shard."""
        x, h = self.latent, self.hidden_size
        count = 2 * (self.pre_norm + self.post_norm) * self.norm_parameters + self.output_bias * h
        if x is not None:  # projections down to latent vectors, and their norms
            count += h * ((x.q_rank or 0) + x.kv_rank + x.rope_dim) + (x.q_rank or 0) + x.kv_rank
        elif self.qk_norm == "head":
            count += 2 * self.head_dim
        if layer.moe and self.experts is not None:
            return count + self.experts.num * (h + self.experts.selection_bias)
        return count + self.mlp_bias * h

    @property
    def end_parameters(self) -> int:
        """Parameters outside the layers: embeddings, final norm, LM head; without padding rows."""
        rows = self.vocab_size * (1 if self.tied else 2) + self.learned_positions * self.max_position_embeddings
        return rows * self.hidden_size + self.norm_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the LM, without padding rows."""
        return sum(map(self.layer_parameters, self.layers)) + self.end_parameters

    def summary(self) -> str:
        """Family and number of parameters, as the log shows them."""
        text = f"{self.family}, {self.num_parameters:,} parameters"
        if self.experts is not None:
            active = sum(self.layer_parameters(layer, active=True) for layer in self.layers) + self.end_parameters
            text += f" ({active:,} a token: {self.experts.top_k} of {self.experts.num} experts)"
        return text

    def flops_per_token(self, seq_length: float) -> float:
        """Forward and backward of one token in a sequence of this mean length: 6 x matmul weights + attention."""
        weights = sum(self.layer_parameters(layer, active=True) for layer in self.layers)
        attended = sum(min(seq_length, layer.window or seq_length) for layer in self.layers)
        attention = 3 * self.num_attention_heads * (self.qk_dim + self.head_dim) * attended
        return 6 * (weights + self.vocab_size * self.hidden_size) + attention


def in_bounds(spec: ModelSpec) -> ModelSpec:
    """The spec with every value of its type. Raises ValueError for one out of bounds, and sizes that do not divide."""
    spec = msgspec.convert(asdict(spec), ModelSpec)
    heads, groups, e = spec.num_attention_heads, spec.num_query_groups, spec.experts
    rotated = [int(spec.rope_dim * rope.fraction) for rope in spec.ropes]
    wrong = {
        f"{groups} key/value heads do not divide {heads} heads": heads % groups,
        f"{len(spec.layers)} kinds of layers for {spec.num_layers} layers": len(spec.layers) != spec.num_layers,
        f"{rotated} rotated dimensions: none, or odd": any(n % 2 or not n for n in rotated),
    }
    if e is not None:
        most = e.num // e.groups * e.top_groups
        wrong[f"{e.num} experts in {spec.num_layers} layers are too many"] = spec.num_layers * e.num > _MAX_EXPERTS
        wrong[f"{e.groups} groups do not divide {e.num} experts"] = e.num % e.groups or e.top_groups > e.groups
        wrong[f"{e.top_k} experts for a token, of {most}"] = e.top_k > most
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(text)
    return spec


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError if it is missing or not a JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError("no config.json", where=str(directory), expected="a HF model directory")
    return read_json(path)


def check_layout(parallel: ParallelConfig, spec: ModelSpec, world: int, *, trained: bool = True,
                 apart: int = 0) -> list[ConfigError]:
    """Every size that does not divide: the model by TP, PP, CP and EP, the world by TP x PP x CP and by EP.

    apart: ranks of torchrun beside the `world` (rollout.num_ranks).
    """
    errors = _tensor_errors(parallel, spec, world) + _pipeline_errors(parallel, spec, world)
    errors += _context_errors(parallel, spec, world)
    tp, pp, cp = _parallel_sizes(parallel)
    if world % (tp * pp * cp):
        context = f" x context {cp}" if cp > 1 else ""
        unit = math.lcm(tp * cp, parallel.expert_model_parallel_size if spec.experts else 1) * pp
        besides = f", {apart} more generate" if apart else ""
        expected = f"a multiple of {tp * pp * cp} ranks{f' to train, and {apart}' if apart else ''}"
        errors.append(ConfigError(f"{world} ranks cannot be divided into tensor {tp} x pipeline {pp}{context}{besides}",
                                  where="parallel", expected=expected, fix=ranks_fix(unit, world=world, apart=apart)))
    return errors + _experts_errors(parallel, spec, world, trained=trained)


def ranks_fix(unit: int, *, world: int, apart: int = 0) -> str | None:
    """The command with the nearest number of ranks of which all but `apart` are a multiple of `unit`; fewer first.

    None if equal nodes, as many as now, allow no such number.
    """
    total, a_node = world + apart, int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    nodes = max(1, total // a_node) if a_node else 1
    fitting = [n for n in range(1, total + apart + unit + 1) if n * nodes > apart and (n * nodes - apart) % unit == 0]
    if not fitting:
        return None
    n = max((n for n in fitting if n * nodes <= total), default=fitting[0])
    if not a_node and "WORLD_SIZE" in os.environ:
        return f"WORLD_SIZE={n} for --dry-run"
    return f"torchrun {f'--nnodes {nodes} ' if nodes > 1 else ''}--nproc-per-node {n} -m mrlhf ..."


def rename_keys(errors: Iterable[MrlhfError], names: dict[str, str]) -> list[MrlhfError]:
    """The errors with the options' names in another command or for another model; other errors as they are."""

    def renamed(text: str | None) -> str | None:
        for old, new in names.items():
            text = text and text.replace(old, new)
        return text

    return [ConfigError(renamed(e.what) or "", where=renamed(e.where), expected=renamed(e.expected), fix=renamed(e.fix))
            if isinstance(e, ConfigError) else e for e in errors]


def _parallel_sizes(parallel: ParallelConfig) -> tuple[int, int, int]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return tp, pp, parallel.context_parallel_size


def _size_error(what: str, key: str, allowed: list[int], *, now: int, ranks: int = 0) -> ConfigError:
    """An error for a size with the values that the model allows.

    The fix is the largest of them up to `now`; of sizes above 1, one that divides `ranks` if there is one.
    """
    lower = [n for n in allowed if n <= max(now, 1)]
    fix = max((n for n in lower if n > 1 and ranks % n == 0), default=max(lower))
    expected = ", ".join(map(str, allowed))
    return ConfigError(f"{key} = {now} does not divide {what}", where=key, expected=expected, fix=f"--{key} {fix}")


def _tensor_errors(parallel: ParallelConfig, spec: ModelSpec, world: int) -> list[ConfigError]:
    tp, groups = parallel.tensor_model_parallel_size, spec.num_query_groups
    limits = {"num_attention_heads": spec.num_attention_heads, "num_key_value_heads (num_query_groups)": groups}
    limits |= {"intermediate_size": spec.ffn_hidden_size, "the padded vocabulary's unit": VOCAB_MULTIPLE}
    if spec.experts is not None:
        limits["the shared experts' intermediate size"] = spec.experts.shared_ffn_hidden_size
        if parallel.expert_model_parallel_size == 1:
            limits["the experts' intermediate size"] = spec.experts.ffn_hidden_size
    wrong = [f"{name} = {size}" for name, size in limits.items() if size % tp]
    if not wrong:
        return []
    allowed = [n for n in range(1, groups + 1) if all(size % n == 0 for size in limits.values())]
    key, others = "parallel.tensor_model_parallel_size", parallel.pipeline_model_parallel_size
    others *= parallel.context_parallel_size
    return [_size_error(f"the model's {', '.join(wrong)}", key, allowed, now=tp, ranks=world // others)]


def _pipeline_errors(parallel: ParallelConfig, spec: ModelSpec, world: int) -> list[ConfigError]:
    """Stages must divide the layers, and virtual stages the layers of each stage."""
    pp, pieces = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    layers = spec.num_layers
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1 or _stages_are_whole(layers, pp, pieces, first, last):
        return []
    if first is not None or last is not None:
        return [_uneven_error(layers, pp, pieces, first, last)]
    if layers % pp:
        allowed = [n for n in range(1, layers + 1) if layers % n == 0]
        key, ranks = "parallel.pipeline_model_parallel_size", world // math.prod(_parallel_sizes(parallel)[::2])
        return [_size_error(f"the model's num_hidden_layers = {layers}", key, allowed, now=pp, ranks=ranks)]
    allowed = [n for n in range(1, layers // pp + 1) if layers // pp % n == 0]
    key = "parallel.virtual_pipeline_model_parallel_size"
    return [_size_error(f"the model's {layers // pp} layers of a stage", key, allowed, now=pieces)]


def _stages_are_whole(layers: int, pp: int, pieces: int, first: int | None, last: int | None) -> bool:
    """Whether the stages between the first and the last are equal, none is empty, and pieces divide them all."""
    ends = [n for n in (first, last) if n is not None]
    rest, stages = layers - sum(ends), pp - len(ends)
    if any(n % pieces for n in ends):
        return False
    return rest > 0 and rest % (stages * pieces) == 0 if stages else rest == 0


def _uneven_error(layers: int, pp: int, pieces: int, first: int | None, last: int | None) -> ConfigError:
    """The fix changes one of the two ends, to the nearest number that leaves whole stages."""
    ends = [n for n in (first, last) if n is not None]
    rest, stages = layers - sum(ends), pp - len(ends)
    which, end = "first and last" if len(ends) == 2 else "uneven", "first" if first is not None else "last"
    what = f"{layers} layers less those of the {which} stage leave {rest} for {stages} stages"
    what += f" of {pieces} virtual stages" if pieces > 1 else ""
    choices = [(abs(n - now), name, n) for name, now in (("first", first), ("last", last)) if now is not None
               for n in range(1, layers + 1)
               if _stages_are_whole(layers, pp, pieces, n if name == "first" else first, n if name == "last" else last)]
    fix = "--parallel.num_layers_in_{1}_pipeline_stage {2}".format(*min(choices)) if choices else None
    where = f"parallel.num_layers_in_{end}_pipeline_stage"
    return ConfigError(what, where=where, expected="whole, equal stages (and virtual stages)", fix=fix)


def _context_errors(parallel: ParallelConfig, spec: ModelSpec, world: int) -> list[ConfigError]:
    """In attention, context-parallel ranks share the heads of a tensor-parallel rank; key/value heads may repeat."""
    tp, pp, cp = _parallel_sizes(parallel)
    if spec.num_attention_heads % tp or spec.num_query_groups % tp:
        return []
    heads, groups = spec.num_attention_heads // tp, spec.num_query_groups // tp
    allowed = [n for n in range(1, heads + 1) if heads % n == 0 and heads // groups % (n // math.gcd(groups, n)) == 0]
    if cp in allowed:
        return []
    what = f"the {heads} heads (and {groups} key/value heads) of a tensor-parallel rank"
    return [_size_error(what, "parallel.context_parallel_size", allowed, now=cp, ranks=world // (tp * pp))]


def _experts_errors(parallel: ParallelConfig, spec: ModelSpec, world: int, *, trained: bool) -> list[ConfigError]:
    tp, pp, _ = _parallel_sizes(parallel)
    ep, key = parallel.expert_model_parallel_size, "parallel.expert_model_parallel_size"
    if spec.experts is None:
        what = f"{key} = {ep}, and the model ({spec.family}) has no experts"
        return [ConfigError(what, where=key, expected="1", fix=f"--{key} 1")] if ep > 1 and trained else []
    errors, num, stage_ranks = [], spec.experts.num, world // pp
    if num % ep or stage_ranks % ep:
        allowed = [n for n in range(1, num + 1) if num % n == 0 and max(1, stage_ranks) % n == 0]
        what = f"the model's {num} experts and the {stage_ranks} ranks of a pipeline stage"
        errors.append(_size_error(what, key, allowed, now=ep))
    if trained and tp > 1 and not parallel.sequence_parallel:
        what = "megatron-core trains experts under tensor parallelism only with sequence parallelism"
        key = "parallel.sequence_parallel"
        errors.append(ConfigError(what, where=key, expected="true", fix=f"--{key} true"))
    return errors
