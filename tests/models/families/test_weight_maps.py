"""The weight maps cover every row of every HF tensor, for any sizes."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.models.families import FAMILIES, hf_tensors, megatron_map, vllm_map
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import VOCAB_MULTIPLE, Experts, Latent, Layer, ModelSpec
from mrlhf.models.reshard_plan import trainer_shard
from mrlhf.parallel.state import Layout


@st.composite
def specs(draw: st.DrawFn, *, splits: int = 1, layers: int = 1) -> ModelSpec:
    """Any model whose heads and sizes `splits` divides; `layers` divides the number of layers."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    is_latent = family in ("deepseek_v2", "deepseek_v3")
    groups, n = splits * draw(st.integers(1, 2)), layers * draw(st.integers(1, 2))
    is_moe = is_latent or family in ("mixtral", "qwen3_moe")
    plain, post_norm = family in ("gpt2", "starcoder2"), family in ("gemma2", "gemma3_text", "olmo2", "glm4")
    return ModelSpec(
        family=family,
        num_layers=n,
        hidden_size=draw(st.integers(1, 6)),
        ffn_hidden_size=splits * draw(st.integers(1, 5)),
        num_attention_heads=groups * (1 if is_latent else draw(st.integers(1, 3))),
        num_query_groups=groups,
        head_dim=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 700)),
        max_position_embeddings=128,
        norm_eps=1e-6,
        tied=draw(st.booleans()),
        layers=tuple(Layer(moe=is_moe and draw(st.booleans())) for _ in range(n)),
        norm="layer" if plain else "rms",
        pre_norm=family != "olmo2",
        post_norm=post_norm,
        qk_norm="all" if family == "olmo2" else "head" if family in ("qwen3", "qwen3_moe", "gemma3_text") else "none",
        qkv_bias=not is_latent and draw(st.booleans()),
        output_bias=not is_latent and draw(st.booleans()),
        mlp_bias=not is_moe and draw(st.booleans()),
        gated=not plain,
        learned_positions=family == "gpt2",
        experts=Experts(
            splits * draw(st.integers(1, 2)),
            1,
            splits * draw(st.integers(1, 3)),
            selection_bias=family == "deepseek_v3",
            shared_ffn_hidden_size=splits * draw(st.integers(1, 2)) if is_latent else 0,
        )
        if is_moe
        else None,
        latent=Latent(draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 3)), 2)
        if is_latent
        else None,
    )


def hf_shapes(spec: ModelSpec, *, head: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint and its shape as [out, in]."""
    return {name: tensor.shape for name, tensor in hf_tensors(spec, head=head).items()}


def copied(spec: ModelSpec, hf: str) -> bool:
    """Held whole by every rank: norms, biases that are added after the sum over ranks, router, positions, score."""
    if spec.qk_norm == "all" and re.search(r"\.[qk]_norm\.", hf):
        return False  # each rank norms its own heads
    return bool(re.search(r"norm|\.ln_|(o_proj|c_proj|down_proj)\.bias|(mlp|moe)\.gate\.weight|wpe|score|_a_proj", hf))


def coverage(
    shapes: dict[str, tuple[int, ...]], shards: list[dict[str, list[TensorSlice]]]
) -> dict[tuple[str, str], list[int]]:
    """(parameter, HF tensor) -> how many ranks hold each row (or column). Also: no two slices of a shard overlap."""
    found: dict[tuple[str, str], list[int]] = {}
    for shard in shards:
        for name, blocks in shard.items():
            taken = sorted((b.offset, b.offset + b.length) for b in blocks)
            assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:], strict=False)), (name, taken)
            for b in blocks:
                rows = found.setdefault((name, b.hf), [0] * shapes[b.hf][b.dim])
                assert b.start >= 0 and b.start + b.length <= len(rows), (name, b)
                for i in range(b.start, b.start + b.length):
                    rows[i] += 1
    return found


@pytest.mark.parametrize("head", ["lm", "value"])
@given(data=st.data(), tp=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_megatron_map_holds_every_row_once(head: str, data: st.DataObject, tp: int) -> None:
    spec = data.draw(specs(splits=tp))
    shapes = hf_shapes(spec, head=head)
    found = coverage(shapes, [megatron_map(spec, head=head, tp=tp, rank=r) for r in range(tp)])
    assert {hf for _, hf in found} == set(shapes)
    for (name, hf), rows in found.items():
        assert set(rows) == {tp if copied(spec, hf) else 1}, (name, hf)
    holders = Counter(hf for _, hf in found)
    shared = {next(iter(shapes)): 2} if spec.tied and head == "lm" else {}
    assert {hf: n for hf, n in holders.items() if n > 1} == shared


@given(data=st.data(), tp=st.sampled_from([1, 2, 4, 8]), replicated=st.booleans())
@settings(max_examples=40, deadline=None)
def test_vllm_map_holds_every_row_once(data: st.DataObject, tp: int, replicated: bool) -> None:
    """Key and value heads are on several ranks where there are fewer of them than ranks."""
    spec = data.draw(specs(splits=tp))
    if replicated and tp > 1:
        spec = ModelSpec(**{**vars(spec), "num_query_groups": tp // 2})
    found = coverage(hf_shapes(spec, head="lm"), [vllm_map(spec, tp=tp, rank=r) for r in range(tp)])
    assert {hf for _, hf in found} == set(hf_shapes(spec, head="lm"))
    for (name, hf), rows in found.items():
        kv_times, q = max(1, tp // spec.num_query_groups), spec.num_attention_heads * spec.head_dim
        if re.search("qkv_proj|c_attn", hf):
            assert set(rows[:q]) == {1} and set(rows[q:]) == {kv_times}, (name, hf)
        else:
            times = tp if copied(spec, hf) else kv_times if ".k_proj" in hf or ".v_proj" in hf else 1
            assert set(rows) == {times}, (name, hf)


def test_trainer_stages_hold_the_whole_model_once() -> None:
    sizes = (4, 8, 16, 4, 2, 4, VOCAB_MULTIPLE + 3, 64)
    spec = ModelSpec("qwen2", *sizes, 1e-6, tied=True, layers=(Layer(),) * 4, qkv_bias=True)
    layout = Layout(8, 2, 2)
    held = [set(trainer_shard(spec, layout, r)) for r in range(layout.world)]
    first, last = held[0], held[7]
    assert not any(name.startswith("decoder.layers.") for name in first & last)
    assert first | last == set(megatron_map(spec, head="lm", tp=2, rank=0))
    assert "output_layer.weight" in last and "output_layer.weight" not in set(trainer_shard(spec, Layout(2, 2, 1), 0))


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (8, {"pp": 4}),
        (8, {"pp": 2, "virtual_stages": 2}),
        (12, {"pp": 3, "virtual_stages": 2}),
        (7, {"pp": 3, "first_layers": 1}),
        (9, {"pp": 3, "last_layers": 1}),
        (9, {"pp": 3, "first_layers": 2, "last_layers": 3}),
        (5, {"pp": 2, "first_layers": 2, "last_layers": 3}),
        (10, {"pp": 3, "virtual_stages": 2, "first_layers": 2, "last_layers": 4}),
    ],
)
def test_stages_are_those_that_megatron_builds(layers: int, options: dict[str, int]) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    pieces = options.get("virtual_stages")
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=options["pp"],
        pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=pieces,
        num_layers_in_first_pipeline_stage=options.get("first_layers"),
        num_layers_in_last_pipeline_stage=options.get("last_layers"),
    )
    expected = [-1] * layers
    for rank in range(options["pp"]):
        for piece in [None] if pieces is None else range(pieces):
            start = get_transformer_layer_offset(config, piece, rank)
            for layer in range(start, start + get_num_layers_to_build(config, piece, rank)):
                expected[layer] = rank
    assert Layout(options["pp"], 1, **options).stage_of_layers(layers) == expected


def test_experts_over_ranks_are_whole_and_each_once() -> None:
    """EP over TP x DP ranks of a stage; what is no expert is split by TP as without EP."""
    experts = Experts(8, 2, 6)
    layers = (Layer(moe=True),) * 2
    spec = ModelSpec("mixtral", 2, 8, 16, 4, 2, 4, 70, 64, 1e-6, tied=False, layers=layers, experts=experts)
    layout = Layout(8, 2, 2, ep=4)
    held = [trainer_shard(spec, layout, r) for r in range(layout.world)]
    count = Counter(name for shard in held for name in shard if "local_experts" in name)
    assert len(count) == 2 * 8 * 2 and set(count.values()) == {1}
    assert {layout.expert_rank(r) for r in range(4)} == {0, 1, 2, 3}
    for shard in held:
        assert all(
            b.length == (8 if b.dim == 0 and b.hf.endswith("gate.weight") else 6)
            for name, blocks in shard.items()
            if "experts" in name
            for b in blocks
        )


@pytest.mark.parametrize("kind", ["lm", "value"])
def test_parameters_are_counted_right(kind: str) -> None:
    for family in FAMILIES:
        for tied in (False, True):
            plain = family in ("gpt2", "starcoder2")
            latents = {"deepseek_v2": Latent(3, 5, 2, 4), "deepseek_v3": Latent(3, None, 2, 4)}
            latent = latents.get(family)
            moe = family in ("mixtral", "qwen3_moe") or latent is not None
            shared = 4 if latent else 0
            experts = Experts(8, 2, 6, selection_bias=family == "deepseek_v3", shared_ffn_hidden_size=shared)
            spec = ModelSpec(
                family,
                3,
                8,
                16,
                4,
                4 if latent else 2,
                4,
                70,
                64,
                1e-6,
                tied=tied,
                layers=(Layer(), Layer(moe=moe), Layer(moe=moe)),
                norm="layer" if plain else "rms",
                qk_norm="none" if latent else "all",
                qkv_bias=True,
                output_bias=latent is None,
                mlp_bias=not moe,
                gated=not plain,
                pre_norm=family != "olmo2",
                post_norm=family in ("gemma2", "gemma3_text", "olmo2", "glm4"),
                learned_positions=family == "gpt2",
                experts=experts if moe else None,
                latent=latent,
            )
            total = sum(math.prod(shape) for shape in hf_shapes(spec, head=kind).values())
            head = spec.hidden_size - (0 if tied else 70 * 8) if kind == "value" else 0
            assert total == spec.num_parameters + head, family
