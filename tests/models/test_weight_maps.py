"""The weight maps cover every row of every HF tensor, for any sizes; the reshard plan built on them equals slicing."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.models.families import FAMILIES, hf_shapes, megatron_map, vllm_map
from mrlhf.models.families.blocks import Block
from mrlhf.models.layouts import make_reshard, trainer_shard
from mrlhf.models.spec import VOCAB_MULTIPLE, Experts, Latent, Layer, ModelSpec
from mrlhf.parallel.reshard import Piece, make_plan
from mrlhf.parallel.state import Layout


@st.composite
def specs(draw: st.DrawFn, *, splits: int = 1, layers: int = 1) -> ModelSpec:
    """Any model whose heads and sizes `splits` divides; `layers` divides the number of layers."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    is_latent = family in ("deepseek_v2", "deepseek_v3")
    groups, n, is_moe = splits * draw(st.integers(1, 2)), layers * draw(st.integers(1, 2)), is_latent or family in ("mixtral", "qwen3_moe")
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
            splits * draw(st.integers(1, 2)), 1, splits * draw(st.integers(1, 3)), selection_bias=family == "deepseek_v3",
            shared_ffn_hidden_size=splits * draw(st.integers(1, 2)) if is_latent else 0,
        ) if is_moe else None,
        latent=Latent(draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 3)), 2) if is_latent else None,
    )


def copied(spec: ModelSpec, hf: str) -> bool:
    """Held whole by every rank: norms, biases that are added after the sum over ranks, router, positions, score."""
    if spec.qk_norm == "all" and re.search(r"\.[qk]_norm\.", hf):
        return False  # each rank norms its own heads
    return bool(re.search(r"norm|\.ln_|(o_proj|c_proj|down_proj)\.bias|(mlp|moe)\.gate\.weight|wpe|score|_a_proj", hf))


def coverage(shapes: dict[str, tuple[int, ...]], shards: list[dict[str, list[Block]]]) -> dict[tuple[str, str], list[int]]:
    """(parameter, HF tensor) -> how often each row (or column) is held over all ranks; also no two blocks of a shard overlap."""
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
    assert {hf: n for hf, n in holders.items() if n > 1} == (
        {next(iter(shapes)): 2} if spec.tied and head == "lm" else {}
    )


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


def shard_tensors(shard: dict[str, list[Block]], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a shard, filled straight from the HF tensors; -1 where no HF row stands (vocabulary padding)."""
    found = {}
    for name, blocks in shard.items():
        shape = list(values[blocks[0].hf].shape) if blocks else [0]
        if blocks:
            shape[blocks[0].dim] = max(b.offset + b.length for b in blocks)
        found[name] = torch.full(shape, -1.0, dtype=torch.float64)
        for b in blocks:
            found[name].narrow(b.dim, b.offset, b.length).copy_(values[b.hf].narrow(b.dim, b.start, b.length))
    return found


def held_rows(shard: dict[str, list[Block]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for blocks in shard.values():
        for b in blocks:
            found[b.hf] |= set(range(b.start, b.start + b.length))
    return found


@given(
    data=st.data(),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 2]),
    rollout=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=40, deadline=None)
def test_reshard_equals_slicing_and_moves_the_least(data: st.DataObject, tp: int, pp: int, dp: int, rollout: int) -> None:
    layout = Layout(tp * pp * dp, tp, pp)
    rollout = math.gcd(rollout, layout.world)
    spec = data.draw(specs(splits=math.lcm(tp, rollout), layers=pp))
    shapes, at = hf_shapes(spec, head="lm"), 0
    values: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        values[name] = torch.arange(at, at + math.prod(shape), dtype=torch.float64).view(shape)
        at += math.prod(shape)
    sources = [trainer_shard(spec, layout, r) for r in range(layout.world)]
    targets = [vllm_map(spec, tp=rollout, rank=r % rollout) for r in range(layout.world)]
    held = [shard_tensors(s, values) for s in sources]
    wanted = [shard_tensors(t, values) for t in targets]
    written = [{n: torch.zeros_like(x) for n, x in w.items()} for w in wanted]
    got = [{n: torch.full_like(x, -1.0) for n, x in w.items()} for w in wanted]
    received = [Counter[str]() for _ in range(layout.world)]

    plan = make_plan(sources, targets, distance=lambda src, dst: ((src - dst) % layout.world,))
    for hf, pieces in plan.items():
        for p in pieces:
            got[p.dst][p.target].narrow(p.dim, p.target_offset, p.length).copy_(
                held[p.src][p.source].narrow(p.dim, p.source_offset, p.length)
            )
            written[p.dst][p.target].narrow(p.dim, p.target_offset, p.length).add_(1)
            if p.src != p.dst:
                received[p.dst][hf] += p.length
    for rank in range(layout.world):
        for name, tensor in wanted[rank].items():
            assert torch.equal(got[rank][name], tensor), (rank, name)
            assert torch.equal(written[rank][name], (tensor >= 0).double()), (rank, name)
        mine, needed = held_rows(sources[rank]), held_rows(targets[rank])
        assert received[rank] == Counter({hf: len(rows - mine[hf]) for hf, rows in needed.items()}), rank


@given(
    data=st.data(), tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2]), dp=st.sampled_from([1, 2]), rollout=st.sampled_from([1, 2])
)
@settings(max_examples=15, deadline=None)
def test_ranks_agree_on_every_message(data: st.DataObject, tp: int, pp: int, dp: int, rollout: int) -> None:
    """What one rank sends another, bucket by bucket and in this order, is what the other expects."""
    layout = Layout(tp * pp * dp, tp, pp)
    rollout = math.gcd(rollout, layout.world)
    spec = data.draw(specs(splits=math.lcm(tp, rollout), layers=pp))
    ranks = [make_reshard(spec, layout, rollout_tp=rollout, rank=r) for r in range(layout.world)]
    assert len({tuple(r._is_remote) for r in ranks}) == 1
    for bucket, is_remote in enumerate(ranks[0]._is_remote):
        for src in range(layout.world):
            for dst in range(layout.world):

                def messages(rank: int, src: int = src, dst: int = dst, bucket: int = bucket) -> list[Piece]:
                    return [p for p in ranks[rank]._buckets[bucket] if (p.src, p.dst) == (src, dst)]

                assert messages(src) == messages(dst)
                assert is_remote or src == dst or not messages(src)


def test_trainer_stages_hold_the_whole_model_once() -> None:
    spec = ModelSpec("qwen2", 4, 8, 16, 4, 2, 4, VOCAB_MULTIPLE + 3, 64, 1e-6, tied=True, layers=(Layer(),) * 4, qkv_bias=True)
    layout = Layout(8, 2, 2)
    held = [set(trainer_shard(spec, layout, r)) for r in range(layout.world)]
    first, last = held[0], held[7]
    assert not any(name.startswith("decoder.layers.") for name in first & last)
    assert first | last == set(megatron_map(spec, head="lm", tp=2, rank=0))
    assert "output_layer.weight" in last and "output_layer.weight" not in set(trainer_shard(spec, Layout(2, 2, 1), 0))


@pytest.mark.parametrize(
    ("layers", "options"),
    [(8, {"pp": 4}), (8, {"pp": 2, "pieces": 2}), (12, {"pp": 3, "pieces": 2}), (7, {"pp": 3, "first_layers": 1}),
     (9, {"pp": 3, "last_layers": 1}), (9, {"pp": 3, "first_layers": 2, "last_layers": 3}), (5, {"pp": 2, "first_layers": 2, "last_layers": 3}),
     (10, {"pp": 3, "pieces": 2, "first_layers": 2, "last_layers": 4})],
)  # fmt: skip
def test_stages_are_those_that_megatron_builds(layers: int, options: dict[str, int]) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    pieces = options.get("pieces")
    config = TransformerConfig(
        num_layers=layers, hidden_size=8, num_attention_heads=2, pipeline_model_parallel_size=options["pp"], pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=pieces, num_layers_in_first_pipeline_stage=options.get("first_layers"),
        num_layers_in_last_pipeline_stage=options.get("last_layers"),
    )  # fmt: skip
    expected = [-1] * layers
    for rank in range(options["pp"]):
        for piece in [None] if pieces is None else range(pieces):
            start = get_transformer_layer_offset(config, piece, rank)
            for layer in range(start, start + get_num_layers_to_build(config, piece, rank)):
                expected[layer] = rank
    assert Layout(options["pp"], 1, **options).stages(layers) == expected


def test_experts_over_ranks_are_whole_and_each_once() -> None:
    """EP over TP x DP ranks of a stage; what is no expert is split by TP as without EP."""
    experts = Experts(8, 2, 6)
    spec = ModelSpec("mixtral", 2, 8, 16, 4, 2, 4, 70, 64, 1e-6, tied=False, layers=(Layer(moe=True),) * 2, experts=experts)
    layout = Layout(8, 2, 2, ep=4)
    held = [trainer_shard(spec, layout, r) for r in range(layout.world)]
    count = Counter(name for shard in held for name in shard if "local_experts" in name)
    assert len(count) == 2 * 8 * 2 and set(count.values()) == {1}
    assert {layout.expert_rank(r) for r in range(4)} == {0, 1, 2, 3}
    for shard in held:
        assert all(b.length == (8 if b.dim == 0 and b.hf.endswith("gate.weight") else 6) for name, blocks in shard.items()
                   if "experts" in name for b in blocks)  # fmt: skip


@pytest.mark.parametrize("kind", ["lm", "value"])
def test_parameters_are_counted_right(kind: str) -> None:
    for family in FAMILIES:
        for tied in (False, True):
            plain = family in ("gpt2", "starcoder2")
            latent = Latent(3, 5, 2, 4) if family == "deepseek_v2" else Latent(3, None, 2, 4) if family == "deepseek_v3" else None
            moe = family in ("mixtral", "qwen3_moe") or latent is not None
            experts = Experts(8, 2, 6, selection_bias=family == "deepseek_v3", shared_ffn_hidden_size=4 if latent else 0)
            spec = ModelSpec(
                family, 3, 8, 16, 4, 4 if latent else 2, 4, 70, 64, 1e-6, tied=tied, layers=(Layer(), Layer(moe=moe), Layer(moe=moe)),
                norm="layer" if plain else "rms", qk_norm="none" if latent else "all", qkv_bias=True, output_bias=latent is None, mlp_bias=not moe,
                gated=not plain, pre_norm=family != "olmo2", post_norm=family in ("gemma2", "gemma3_text", "olmo2", "glm4"),
                learned_positions=family == "gpt2", experts=experts if moe else None, latent=latent,
            )  # fmt: skip
            total = sum(math.prod(shape) for shape in hf_shapes(spec, head=kind).values())
            assert total == spec.num_parameters + (spec.hidden_size - (0 if tied else 70 * 8) if kind == "value" else 0), family
