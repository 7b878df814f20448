"""Every plan ends under NCCL's rules: shipped ones, some that once stood still, and random ones with pipelines."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import replace

import pytest
import torch
from parallel.nccl import standing_still
from test_examples import LARGE, LLAMA_3_8B, LLAMA_3_70B, YAMLS, name, stage_of

from mrlhf.config.load import load_config
from mrlhf.config.options import STAGES
from mrlhf.models.families import spec_from_hf
from mrlhf.models.families.spec import Experts, Layer, ModelSpec, Rope
from mrlhf.models.reshard_plan import make_planner
from mrlhf.parallel.planner import Planner
from mrlhf.parallel.reshard import Reshard
from mrlhf.parallel.state import Layout
from mrlhf.parallel.weight_update import WeightUpdate

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "num_experts": 32, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
TOY = LLAMA_3_8B | {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 20, "num_attention_heads": 8, "vocab_size": 512
}  # fmt: skip


def plans_of(spec: ModelSpec, layout: Layout, *, rollout_tp: int, bucket: int, generators: int = 0) -> list[Reshard]:
    planner = make_planner(spec, layout, rollout_tp=rollout_tp, node=8, generators=generators)
    ranks = range(layout.world + generators)
    return [Reshard(planner, rank=rank, dtype=torch.bfloat16, bucket_bytes=bucket) for rank in ranks]


@pytest.mark.parametrize(
    "hf,layers,layout,rollout_tp,bucket_mib",
    [
        (LLAMA_3_8B, 32, Layout(8, 2, 4), 2, 256),
        (LLAMA_3_8B, 32, Layout(8, 1, 8), 1, 256),
        (LLAMA_3_8B, 32, Layout(16, 2, 2, virtual_stages=2), 4, 256),
        (LLAMA_3_70B, 16, Layout(32, 8, 4), 8, 256),
        (LLAMA_3_70B, 16, Layout(16, 4, 4), 8, 256),
        (QWEN3_MOE, 4, Layout(16, 2, 4, ep=2), 4, 64),
    ],
)
def test_what_stood_still_ends(hf: dict, layers: int, layout: Layout, rollout_tp: int, bucket_mib: int) -> None:
    spec = spec_from_hf(hf | {"num_hidden_layers": layers}, where="")
    plans = plans_of(spec, layout, rollout_tp=rollout_tp, bucket=bucket_mib << 20)
    assert standing_still([plan.buckets for plan in plans]) == 0
    fullest = max(sum(map(plan.room, bucket)) for plan in plans for bucket in plan.buckets)
    assert 0.9 * (bucket_mib << 19) < fullest <= bucket_mib << 19, "two are under way, and both fit"
    senders: dict[int, set[int]] = {}  # of every bucket: the stages that send
    for message in (m for plan in plans for bucket in plan.buckets for m in bucket):
        senders.setdefault(message.key[0], set()).add(layout.coordinates(message.src)[2])
    assert sum(map(len, senders.values())) > 0.7 * layout.pp * len(senders), "stages send at the same time"


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_shipped_layouts_end(path) -> None:
    """At real widths; 20 layers instead of 80 keep the stages of the 70B model."""
    stage = stage_of(path)
    config = load_config(STAGES[stage], str(path), [])
    replica = Layout.from_config(config.parallel, 1).ranks_per_replica
    rollout_tp = config.rollout.tensor_parallel_size if stage == "ppo" else replica
    layout = Layout.from_config(config.parallel, 2 * math.lcm(replica, rollout_tp))
    hf = LARGE[path.stem][0] if path.stem in LARGE else TOY
    spec = spec_from_hf(hf | {"num_hidden_layers": 20 if layout.pp > 1 else 2}, where="")
    plans = plans_of(spec, layout, rollout_tp=min(rollout_tp, 8), bucket=256 << 20 if path.stem in LARGE else 8 << 10)
    assert standing_still([plan.buckets for plan in plans]) == 0


def random_spec(draw: random.Random, layout: Layout, splits: int) -> ModelSpec:
    layers = layout.pp * layout.virtual_stages * (1 if draw.random() < 0.8 else 2)
    moe, groups = layout.ep > 1 or draw.random() < 0.3, splits * draw.choice([1, 2])
    return ModelSpec(
        family="qwen3_moe" if moe else "llama", num_layers=layers, hidden_size=draw.choice([8, 12, 31]),
        ffn_hidden_size=splits * draw.choice([2, 5]), num_attention_heads=2 * groups, num_query_groups=groups,
        head_dim=4, vocab_size=draw.choice([64, 200]), max_position_embeddings=128, norm_eps=1e-6,
        tied=draw.random() < 0.3, layers=tuple(Layer(moe=moe and i % 3 > 0) for i in range(layers)),
        qk_norm="head" if moe else "none", ropes=(Rope(theta=1e4),),
        experts=Experts(splits * draw.choice([1, 2]), 1, splits * draw.choice([1, 3])) if moe else None,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a test share a planner; the numbers of its buckets are the same for all."""
    monkeypatch.setattr(Planner, "bucket_numbers", functools.lru_cache(Planner.bucket_numbers))


@pytest.mark.parametrize("part", range(4))
def test_random_layouts_end(part: int) -> None:
    """50 layouts with pipelines each time: of vLLM on the trainer's ranks or on its own, weights in place or made."""
    draw, messages = random.Random(f"layouts {part}"), 0
    for _ in range(50):
        tp, pp, dp = draw.choice([1, 2, 4]), draw.choice([2, 2, 3, 4]), draw.choice([1, 1, 2])
        cp = draw.choice([1, 1, 2]) if tp * pp * dp < 9 else 1
        ep = draw.choice([n for n in (1, 1, 2, 4) if tp * cp * dp % n == 0])
        layout = Layout(tp * pp * dp * cp, tp, pp, ep=ep, cp=cp, virtual_stages=draw.choice([1, 1, 2]))
        rollout_tp = math.gcd(draw.choice([1, 2, 4]), layout.world)
        generators = rollout_tp * draw.choice([0, 0, 1, 2])
        spec = random_spec(draw, layout, math.lcm(tp, ep, rollout_tp))
        if layout.virtual_stages == 1 and draw.random() < 0.3:
            spec = replace(spec, num_layers=spec.num_layers + 1, layers=(*spec.layers, Layer(moe=False)))
            layout = replace(layout, last_layers=spec.num_layers // pp + 1)
        planner = make_planner(spec, layout, rollout_tp=rollout_tp, node=4, generators=generators)
        makes = not generators and draw.random() < 0.3
        linear = {n for n in planner.targets[-1] if makes and n.endswith("_proj.weight")}
        bucket = draw.choice([1024, 4096, 32768])
        updates = [
            WeightUpdate(planner, made=linear, rank=rank, dtype=torch.bfloat16, bucket_bytes=bucket)
            for rank in range(layout.world + generators)
        ]
        plans = [[update.in_place, *(plan for _, plan in update.rounds)] for update in updates]
        buckets = [
            [[replace(m, key=(i, *m.key)) for m in bucket] for i, plan in enumerate(some) for bucket in plan.buckets]
            for some in plans
        ]
        assert standing_still(buckets) == 0, (layout, rollout_tp, generators, bool(linear), bucket)
        messages += sum(map(len, (bucket for some in buckets for bucket in some)))
    assert messages > 50_000
