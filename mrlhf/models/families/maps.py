"""ModelSpec and Names -> the weight map of a decoder: one entry a parameter, for Megatron, vLLM and HF's files together.

Megatron's names carry the global layer index, and of experts the global index too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mrlhf.models.families.blocks import Columns, Copy, GroupedQKV, Ref, Rule, Stacked, StackedQKV, Vocab
from mrlhf.models.families.names import Names, VLLMNames
from mrlhf.models.families.spec import VOCAB_MULTIPLE, ModelSpec

VLLM_VOCAB_MULTIPLE = 64
# what it is drawn as: `out` writes into the residual; `choice` decides which experts a token goes to, is not trained, and stays in fp32
Kind = Literal["embedding", "norm", "bias", "in", "out", "score", "choice"]


@dataclass(frozen=True)
class HFTensor:
    """`shape` is [out, in]; the file has it the other way round where `transposed`."""

    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False

    @property
    def in_fp32(self) -> bool:
        """In checkpoints and files of any dtype: rounded, such a number would choose other experts."""
        return self.kind == "choice"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Entry:
    """A parameter: its names, the rule of its shards on either side, and the HF tensors it is made of."""

    megatron: str
    rule: Rule
    vllm: str
    vllm_rule: Rule
    hf: dict[str, HFTensor]
    is_expert: bool = False


def entries(spec: ModelSpec, names: Names, vllm: VLLMNames, *, head: str) -> Iterator[Entry]:
    """Every parameter of the model. `head`: lm or value."""
    h, vocab = spec.hidden_size, (spec.vocab_size, spec.hidden_size)
    embedding = names.embedding + ".weight"

    def vocabulary(megatron: str, hf: str) -> Entry:
        return Entry(
            megatron, Vocab(hf, spec.vocab_size, VOCAB_MULTIPLE), hf, Vocab(hf, spec.vocab_size, VLLM_VOCAB_MULTIPLE),
            {hf: HFTensor(vocab, "embedding")},
        )  # fmt: skip

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
        there, here = f"decoder.layers.{i}.", names.layer.format(i=i)
        yield from _attention(spec, names, vllm, there, here)
        if layer.moe:
            yield from _experts(spec, names, vllm, there, here)
        else:
            yield from _mlp(spec, names, vllm, there, here)


def _copied(megatron: str, hf: str, shape: tuple[int, ...], kind: Kind) -> Entry:
    rule = Copy(hf, shape[0])
    return Entry(megatron, rule, hf, rule, {hf: HFTensor(shape, kind)})


def _norm(spec: ModelSpec, megatron: str, hf: str) -> Iterator[Entry]:
    yield _copied(f"{megatron}.weight", f"{hf}.weight", (spec.hidden_size,), "norm")
    if spec.norm == "layer":
        yield _copied(f"{megatron}.bias", f"{hf}.bias", (spec.hidden_size,), "bias")


def _row_parallel(
    megatron: str, hf: str, shape: tuple[int, int], *, bias: bool, transposed: bool, is_expert: bool = False
) -> Iterator[Entry]:
    name = hf + ".weight"
    rule = Columns(name, shape[1])
    yield Entry(megatron + ".weight", rule, name, rule, {name: HFTensor(shape, "out", transposed)}, is_expert)
    if bias:
        yield _copied(megatron + ".bias", hf + ".bias", shape[:1], "bias")


def _attention(spec: ModelSpec, names: Names, vllm: VLLMNames, there: str, here: str) -> Iterator[Entry]:
    h, q, kv = spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    heads = (spec.num_attention_heads, spec.num_query_groups, spec.head_dim)
    if spec.pre_norm:
        yield from _norm(spec, there + "input_layernorm", here + names.attention_norm)
    if spec.latent is not None:
        yield from _latent(spec, names, there + "self_attention.", here)
    for part in () if spec.latent else ("weight", "bias") if spec.qkv_bias else ("weight",):
        hf = [f"{here}{name}.{part}" for name in names.qkv]
        fused = len(hf) == 1
        rows = (q + 2 * kv,) if fused else (q, kv, kv)
        refs = (Ref(hf[0]), Ref(hf[0], q), Ref(hf[0], q + kv)) if fused else (Ref(hf[0]), Ref(hf[1]), Ref(hf[2]))
        tensors = {
            name: HFTensor((n, h), "in", names.transposed) if part == "weight" else HFTensor((n,), "bias")
            for name, n in zip(hf, rows, strict=True)
        }
        yield Entry(
            f"{there}self_attention.linear_qkv.{part}",
            GroupedQKV(refs, *heads),
            f"{here}{vllm.qkv}.{part}",
            StackedQKV(refs, *heads),
            tensors,
        )
    if spec.qk_norm == "head":
        for x, name in (("q", names.q_norm), ("k", names.k_norm)):
            yield _copied(f"{there}self_attention.{x}_layernorm.weight", f"{here}{name}.weight", (spec.head_dim,), "norm")
    elif spec.qk_norm == "all":
        for x, name, n in (("q", names.q_norm, q), ("k", names.k_norm, kv)):
            hf_name = f"{here}{name}.weight"
            rule = Stacked((Ref(hf_name),), n)
            yield Entry(f"{there}self_attention.{x}_layernorm.weight", rule, hf_name, rule, {hf_name: HFTensor((n,), "norm")})
    yield from _row_parallel(
        there + "self_attention.linear_proj", here + names.output, (h, q), bias=spec.output_bias, transposed=names.transposed
    )
    if spec.post_norm:
        yield from _norm(spec, there + "self_attn_bda.norm", here + names.attention_post_norm)


def _latent(spec: ModelSpec, names: Names, there: str, here: str) -> Iterator[Entry]:
    """Down to the latent vectors whole on every rank, up to the heads cut by them; vLLM likewise, with VLLM_MLA_DISABLE (rl/vllm_engine.py)."""
    x, h, n = spec.latent, spec.hidden_size, spec.num_attention_heads
    assert x is not None

    def up(megatron: str, hf: str, shape: tuple[int, int]) -> Entry:
        rule = Stacked((Ref(hf),), shape[0])
        return Entry(megatron, rule, hf, rule, {hf: HFTensor(shape, "in")})

    if x.q_rank is None:
        yield up(there + "linear_q_up.weight", f"{here}{names.qkv[0]}.weight", (n * spec.qk_dim, h))
    else:
        yield _copied(there + "linear_q_down.weight", f"{here}{names.q_down}.weight", (x.q_rank, h), "in")
        yield _copied(there + "q_layernorm.weight", f"{here}{names.q_down_norm}.weight", (x.q_rank,), "norm")
        yield up(there + "linear_q_up.weight", f"{here}{names.q_up}.weight", (n * spec.qk_dim, x.q_rank))
    yield _copied(there + "linear_kv_down.weight", f"{here}{names.kv_down}.weight", (x.kv_rank + x.rope_dim, h), "in")
    yield _copied(there + "kv_layernorm.weight", f"{here}{names.kv_down_norm}.weight", (x.kv_rank,), "norm")
    yield up(there + "linear_kv_up.weight", f"{here}{names.kv_up}.weight", (n * (x.nope_dim + spec.head_dim), x.kv_rank))


def _mlp(spec: ModelSpec, names: Names, vllm: VLLMNames, there: str, here: str) -> Iterator[Entry]:
    h, f = spec.hidden_size, spec.ffn_hidden_size
    if spec.pre_norm:
        yield from _norm(spec, there + "pre_mlp_layernorm", here + names.mlp_norm)
    for part in ("weight", "bias") if spec.mlp_bias else ("weight",):
        hf = [f"{here}{name}.{part}" for name in names.fc1]
        rows = 2 * f if spec.gated and len(hf) == 1 else f
        refs = (Ref(hf[0]), Ref(hf[0], f)) if rows > f else tuple(map(Ref, hf))
        shape, kind = ((rows, h), "in") if part == "weight" else ((rows,), "bias")
        rule = Stacked(refs, f)
        tensors = {name: HFTensor(shape, kind, names.transposed and part == "weight") for name in hf}  # type: ignore[arg-type]
        yield Entry(f"{there}mlp.linear_fc1.{part}", rule, f"{here}{vllm.fc1}.{part}", rule, tensors)
    yield from _row_parallel(there + "mlp.linear_fc2", here + names.fc2, (h, f), bias=spec.mlp_bias, transposed=names.transposed)
    if spec.post_norm:
        yield from _norm(spec, there + "mlp_bda.norm", here + names.mlp_post_norm)


def _experts(spec: ModelSpec, names: Names, vllm: VLLMNames, there: str, here: str) -> Iterator[Entry]:
    experts = spec.experts
    assert experts is not None and spec.gated and not spec.mlp_bias and not spec.post_norm, "no family has other experts"
    h, f = spec.hidden_size, experts.ffn_hidden_size
    yield from _norm(spec, there + "pre_mlp_layernorm", here + names.mlp_norm)
    yield _copied(there + "mlp.router.weight", f"{here}{names.router}.weight", (experts.num, h), "in")
    if experts.selection_bias:
        yield _copied(there + "mlp.router.expert_bias", here + names.selection_bias, (experts.num,), "choice")
    if experts.shared_ffn_hidden_size:
        hf = tuple(f"{here}{name}.weight" for name in names.shared_fc1)
        rule, shape = Stacked(tuple(map(Ref, hf)), experts.shared_ffn_hidden_size), (experts.shared_ffn_hidden_size, h)
        tensors = {name: HFTensor(shape, "in") for name in hf}
        yield Entry(there + "mlp.shared_experts.linear_fc1.weight", rule, f"{here}{vllm.shared_fc1}.weight", rule, tensors)
        yield from _row_parallel(
            there + "mlp.shared_experts.linear_fc2", here + names.shared_fc2, shape[::-1], bias=False, transposed=False
        )
    for e in range(experts.num):
        local = f"{there}mlp.experts.local_experts.{e}."
        gate_up = tuple(f"{here}{name.format(e=e)}.weight" for name in names.expert_fc1)
        rule = Stacked(tuple(map(Ref, gate_up)), f)
        tensors = {name: HFTensor((f, h), "in") for name in gate_up}
        yield Entry(local + "linear_fc1.weight", rule, f"{here}{vllm.experts}{e}.w13_weight", rule, tensors, is_expert=True)
        for entry in _row_parallel(
            local + "linear_fc2", here + names.expert_fc2.format(e=e), (h, f), bias=False, transposed=False, is_expert=True
        ):
            yield Entry(entry.megatron, entry.rule, f"{here}{vllm.experts}{e}.w2_weight", entry.rule, entry.hf, is_expert=True)
