"""ModelSpec and Names -> the weight map of a decoder: one entry per parameter, for Megatron, vLLM and HF's files.

In Megatron's names layers and experts carry their global index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mrlhf.models.families.names import Names, VLLMNames
from mrlhf.models.families.slices import Copy, GroupedQKV, Ref, RowParallel, Rule, Stacked, StackedQKV, Vocab
from mrlhf.models.families.spec import VOCAB_MULTIPLE, ModelSpec

VLLM_VOCAB_MULTIPLE = 64
# How a new tensor is initialised (gpt.py). `out` writes into the residual; `choice` biases the choice of
# experts: it is not trained and stays in fp32.
Kind = Literal["embedding", "norm", "bias", "in", "out", "score", "choice"]


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the HF checkpoint. `shape` is [out, in]; the file stores [in, out] if `transposed`."""

    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False

    @property
    def in_fp32(self) -> bool:
        """Whether it stays fp32 in checkpoints and files of any dtype: rounding it would choose other experts."""
        return self.kind == "choice"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class MapEntry:
    """A parameter: name and sharding rule in Megatron and in vLLM, and the HF tensors that it consists of."""

    megatron: str
    rule: Rule
    vllm: str
    vllm_rule: Rule
    hf: dict[str, HFTensor]
    is_expert: bool = False


def map_entries(spec: ModelSpec, names: Names, vllm: VLLMNames, *, head: str) -> Iterator[MapEntry]:
    """Every parameter of the model. head: "lm" or "value"."""
    h, rows = spec.hidden_size, spec.vocab_size
    embedding = names.embedding + ".weight"

    def vocabulary(megatron: str, hf: str) -> MapEntry:
        rule, vllm_rule = Vocab(hf, rows, VOCAB_MULTIPLE), Vocab(hf, rows, VLLM_VOCAB_MULTIPLE)
        return MapEntry(megatron, rule, hf, vllm_rule, {hf: HFTensor((rows, h), "embedding")})

    yield vocabulary("embedding.word_embeddings.weight", embedding)
    if spec.learned_positions:
        name = names.positions + ".weight"
        yield _copied("embedding.position_embeddings.weight", name, (spec.max_position_embeddings, h), "embedding")
    yield from _norm(spec, "decoder.final_layernorm", names.final_norm)
    if head == "value":
        yield _copied("output_layer.weight", "score.weight", (1, h), "score")
    else:
        yield vocabulary("output_layer.weight", embedding if spec.tied else names.head + ".weight")
    for i, layer in enumerate(spec.layers):
        megatron, hf = f"decoder.layers.{i}.", names.layer.format(i=i)
        yield from _attention(spec, names, vllm, megatron, hf)
        yield from (_experts if layer.moe else _mlp)(spec, names, vllm, megatron, hf)


def _copied(megatron: str, hf: str, shape: tuple[int, ...], kind: Kind) -> MapEntry:
    rule = Copy(hf, shape[0])
    return MapEntry(megatron, rule, hf, rule, {hf: HFTensor(shape, kind)})


def _column_parallel(megatron: str, hf: str, shape: tuple[int, ...], kind: Kind = "in") -> MapEntry:
    rule = Stacked((Ref(hf),), shape[0])
    return MapEntry(megatron, rule, hf, rule, {hf: HFTensor(shape, kind)})


def _norm(spec: ModelSpec, megatron: str, hf: str) -> Iterator[MapEntry]:
    yield _copied(f"{megatron}.weight", f"{hf}.weight", (spec.hidden_size,), "norm")
    if spec.norm == "layer":
        yield _copied(f"{megatron}.bias", f"{hf}.bias", (spec.hidden_size,), "bias")


def _row_parallel(
    megatron: str, hf: str, shape: tuple[int, int], *, bias: bool = False, transposed: bool = False
) -> Iterator[MapEntry]:
    name = hf + ".weight"
    rule = RowParallel(name, shape[1])
    yield MapEntry(megatron + ".weight", rule, name, rule, {name: HFTensor(shape, "out", transposed)})
    if bias:
        yield _copied(megatron + ".bias", hf + ".bias", shape[:1], "bias")


def _attention(spec: ModelSpec, names: Names, vllm: VLLMNames, megatron: str, hf: str) -> Iterator[MapEntry]:
    h, q, kv = spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    attention = megatron + "self_attention."
    if spec.pre_norm:
        yield from _norm(spec, megatron + "input_layernorm", hf + names.attention_norm)
    if spec.latent is not None:
        yield from _latent(spec, names, attention, hf)
    else:
        yield from _qkv(spec, names, vllm, attention, hf)
    if spec.qk_norm != "none":
        for x, name, n in (("q", names.q_norm, q), ("k", names.k_norm, kv)):
            norm, hf_norm = f"{attention}{x}_layernorm.weight", f"{hf}{name}.weight"
            if spec.qk_norm == "head":
                yield _copied(norm, hf_norm, (spec.head_dim,), "norm")
            else:
                yield _column_parallel(norm, hf_norm, (n,), "norm")
    output = attention + "linear_proj", hf + names.output
    yield from _row_parallel(*output, (h, q), bias=spec.output_bias, transposed=names.transposed)
    if spec.post_norm:
        yield from _norm(spec, megatron + "self_attn_bda.norm", hf + names.attention_post_norm)


def _qkv(spec: ModelSpec, names: Names, vllm: VLLMNames, attention: str, hf: str) -> Iterator[MapEntry]:
    heads = (spec.num_attention_heads, spec.num_query_groups, spec.head_dim)
    q, kv = heads[0] * spec.head_dim, heads[1] * spec.head_dim
    for part in ("weight", "bias") if spec.qkv_bias else ("weight",):
        stored = [f"{hf}{name}.{part}" for name in names.qkv]
        if len(stored) == 1:
            refs, rows = (Ref(stored[0]), Ref(stored[0], q), Ref(stored[0], q + kv)), [q + 2 * kv]
        else:
            refs, rows = (Ref(stored[0]), Ref(stored[1]), Ref(stored[2])), [q, kv, kv]
        if part == "weight":
            kinds = [HFTensor((n, spec.hidden_size), "in", names.transposed) for n in rows]
        else:
            kinds = [HFTensor((n,), "bias") for n in rows]
        tensors = dict(zip(stored, kinds, strict=True))
        rule, vllm_rule = GroupedQKV(refs, *heads), StackedQKV(refs, *heads)
        yield MapEntry(f"{attention}linear_qkv.{part}", rule, f"{hf}{vllm.qkv}.{part}", vllm_rule, tensors)


def _latent(spec: ModelSpec, names: Names, attention: str, hf: str) -> Iterator[MapEntry]:
    """Every rank holds the projections down to the latent vectors whole; the projections up are sharded by heads.

    vLLM does the same under VLLM_MLA_DISABLE (rl/rollout/vllm_engine.py).
    """
    x, h, n = spec.latent, spec.hidden_size, spec.num_attention_heads
    assert x is not None
    q_rows, kv_rows = n * spec.qk_dim, n * (x.nope_dim + spec.head_dim)
    if x.q_rank is None:
        yield _column_parallel(attention + "linear_q_up.weight", f"{hf}{names.qkv[0]}.weight", (q_rows, h))
    else:
        yield _copied(attention + "linear_q_down.weight", f"{hf}{names.q_down}.weight", (x.q_rank, h), "in")
        yield _copied(attention + "q_layernorm.weight", f"{hf}{names.q_down_norm}.weight", (x.q_rank,), "norm")
        yield _column_parallel(attention + "linear_q_up.weight", f"{hf}{names.q_up}.weight", (q_rows, x.q_rank))
    yield _copied(attention + "linear_kv_down.weight", f"{hf}{names.kv_down}.weight", (x.kv_rank + x.rope_dim, h), "in")
    yield _copied(attention + "kv_layernorm.weight", f"{hf}{names.kv_down_norm}.weight", (x.kv_rank,), "norm")
    yield _column_parallel(attention + "linear_kv_up.weight", f"{hf}{names.kv_up}.weight", (kv_rows, x.kv_rank))


def _mlp(spec: ModelSpec, names: Names, vllm: VLLMNames, megatron: str, hf: str) -> Iterator[MapEntry]:
    h, f = spec.hidden_size, spec.ffn_hidden_size
    if spec.pre_norm:
        yield from _norm(spec, megatron + "pre_mlp_layernorm", hf + names.mlp_norm)
    for part in ("weight", "bias") if spec.mlp_bias else ("weight",):
        stored = [f"{hf}{name}.{part}" for name in names.fc1]
        rows = 2 * f if spec.gated and len(stored) == 1 else f
        refs = (Ref(stored[0]), Ref(stored[0], f)) if rows > f else tuple(map(Ref, stored))
        tensor = HFTensor((rows, h), "in", names.transposed) if part == "weight" else HFTensor((rows,), "bias")
        rule, tensors = Stacked(refs, f), dict.fromkeys(stored, tensor)
        yield MapEntry(f"{megatron}mlp.linear_fc1.{part}", rule, f"{hf}{vllm.fc1}.{part}", rule, tensors)
    fc2 = megatron + "mlp.linear_fc2", hf + names.fc2
    yield from _row_parallel(*fc2, (h, f), bias=spec.mlp_bias, transposed=names.transposed)
    if spec.post_norm:
        yield from _norm(spec, megatron + "mlp_bda.norm", hf + names.mlp_post_norm)


def _gated_fc1(megatron: str, hf: list[str], vllm: str, shape: tuple[int, int]) -> MapEntry:
    """Gate over up: two HF tensors of this shape."""
    rule = Stacked(tuple(map(Ref, hf)), shape[0])
    return MapEntry(megatron, rule, vllm, rule, dict.fromkeys(hf, HFTensor(shape, "in")))


def _experts(spec: ModelSpec, names: Names, vllm: VLLMNames, megatron: str, hf: str) -> Iterator[MapEntry]:
    x, h = spec.experts, spec.hidden_size
    assert x is not None and spec.gated and not spec.mlp_bias and not spec.post_norm, "no family has other experts"
    yield from _norm(spec, megatron + "pre_mlp_layernorm", hf + names.mlp_norm)
    yield _copied(megatron + "mlp.router.weight", f"{hf}{names.router}.weight", (x.num, h), "in")
    if x.selection_bias:
        yield _copied(megatron + "mlp.router.expert_bias", hf + names.selection_bias, (x.num,), "choice")
    if x.shared_ffn_hidden_size:
        shared, f = megatron + "mlp.shared_experts.", x.shared_ffn_hidden_size
        stored = [f"{hf}{name}.weight" for name in names.shared_fc1]
        yield _gated_fc1(shared + "linear_fc1.weight", stored, f"{hf}{vllm.shared_fc1}.weight", (f, h))
        yield from _row_parallel(shared + "linear_fc2", hf + names.shared_fc2, (h, f))
    for e in range(x.num):
        local, f = f"{megatron}mlp.experts.local_experts.{e}.", x.ffn_hidden_size
        stored, in_vllm = [f"{hf}{name.format(e=e)}.weight" for name in names.expert_fc1], f"{hf}{vllm.experts}{e}."
        fc1 = _gated_fc1(local + "linear_fc1.weight", stored, in_vllm + "w13_weight", (f, h))
        (fc2,) = _row_parallel(local + "linear_fc2", hf + names.expert_fc2.format(e=e), (h, f))
        yield replace(fc1, is_expert=True)
        yield replace(fc2, vllm=in_vllm + "w2_weight", is_expert=True)
