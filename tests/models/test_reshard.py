"""The reshard plan: what arrives equals slicing, nothing moves that is held, both ends agree;
and the exchange of 28 pairs of layouts on 8 ranks.
"""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from conftest import TESTS, python
from hypothesis import given, settings
from hypothesis import strategies as st

from models.families.test_weight_maps import hf_shapes, specs
from models.reshard_program import CASES, minimum, shard_tensors
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.reshard_plan import make_planner
from mrlhf.parallel.planner import Planner
from mrlhf.parallel.reshard import Reshard
from mrlhf.parallel.state import Layout


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int, int, int]:
    """(a layout of at most 16 ranks, how many layers it wants the number of layers to be a multiple of, vLLM's
    tensor-parallel size, ranks of vLLM's own or 0)."""
    tp, pp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    pieces = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if tp * dp % n == 0]))
    layout = Layout(tp * pp * dp, tp, pp, ep=ep, virtual_stages=pieces)
    rollout, replicas = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([0, 1, 3]))
    if replicas:
        return layout, pp * pieces, rollout, rollout * replicas
    return layout, pp * pieces, math.gcd(rollout, layout.world), 0


@given(data=st.data(), chosen=layouts(), limit=st.sampled_from([1, 40, 10**6]), node=st.sampled_from([1, 2, 16]))
@settings(max_examples=60, deadline=None)
def test_plan_equals_slicing_moves_the_least_and_is_agreed(
    data: st.DataObject, chosen: tuple[Layout, int, int, int], limit: int, node: int
) -> None:
    layout, layers, rollout, generators = chosen
    spec = data.draw(specs(splits=math.lcm(layout.tp, rollout, layout.ep), layers=layers))
    shapes, at = hf_shapes(spec, head="lm"), 0
    values: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        values[name] = torch.arange(at, at + math.prod(shape), dtype=torch.float64).view(shape)
        at += math.prod(shape)
    planner = make_planner(spec, layout, rollout_tp=rollout, node=node, generators=generators)
    sources, world = sources_of(spec, layout) + [{}] * generators, layout.world + generators
    held = [shard_tensors(s, values) for s in sources]
    wanted = [shard_tensors(t, values) for t in planner.targets]
    got = [{n: torch.full_like(x, -1.0) for n, x in w.items()} for w in wanted]
    written = [{n: torch.zeros_like(x) for n, x in w.items()} for w in wanted]
    messages = [planner.messages(r, limit=limit) for r in range(world)]
    for rank in range(world):
        copies = [p for p in planner.incoming(rank) if p.src == rank]
        received = [m for m in messages[rank] if m.dst == rank]
        for p in (*copies, *(p for m in received for p in m.transfers)):
            got[rank][p.target].narrow(p.dim, p.target_offset, p.length).copy_(
                held[p.src][p.source].narrow(p.dim, p.source_offset, p.length)
            )
            written[rank][p.target].narrow(p.dim, p.target_offset, p.length).add_(1)
        for name, tensor in wanted[rank].items():
            assert torch.equal(got[rank][name], tensor), (rank, name)
            assert torch.equal(written[rank][name], (tensor >= 0).double()), (rank, name)
        assert sum(m.numel for m in received) == minimum(shapes, sources[rank], planner.targets[rank])
        assert all(m.numel <= limit or (len(m.transfers), m.transfers[0].length) == (1, 1) for m in messages[rank])
        # what one rank sends is what the other expects, and in the same place of one order without ties
        for other in range(world):
            assert [m for m in messages[rank] if m.src == rank and m.dst == other] == [
                m for m in messages[other] if m.src == rank and m.dst == other
            ]
        assert [m.key for m in messages[rank]] == sorted({m.key for m in messages[rank]})
    totals = planner.bytes_of_ranks(2)
    for r, mine in enumerate(messages):
        pieces = [p for m in mine for p in m.transfers]
        parts = (
            [p for p in pieces if p.src == r],
            [p for p in pieces if p.dst == r],
            [p for p in planner.incoming(r) if p.src == r],
        )
        assert totals[r] == tuple(sum(planner.nbytes(p, 2) for p in part) for part in parts)


@given(data=st.data(), chosen=layouts(), limit=st.sampled_from([1, 300, 10**6]))
@settings(max_examples=30, deadline=None)
def test_rounds_are_the_whole_plan_in_parts(
    data: st.DataObject, chosen: tuple[Layout, int, int, int], limit: int
) -> None:
    """What is not written in place comes in rounds:
    every parameter once, few at a time, and no byte more than in one exchange.
    """
    layout, layers, rollout, _ = chosen
    rollout = math.gcd(rollout, layout.world)
    spec = data.draw(specs(splits=math.lcm(layout.tp, rollout, layout.ep), layers=layers))
    planner = make_planner(spec, layout, rollout_tp=rollout, node=1)
    made = {n for n in planner.targets[0] if n.endswith("_proj.weight")}
    rounds = planner.rounds(made, limit)
    assert sorted(n for names in rounds for n in names) == sorted(made)
    sizes = {n: math.prod(planner.shape(n)) for n in made}
    assert all(sum(sorted(sizes[n] for n in names)[: -layout.pp]) <= limit for names in rounds), (
        "one of each stage may be larger"
    )
    parts = [planner.restricted_to(names) for names in ({*planner.targets[0]} - made, *rounds)]
    for rank in range(layout.world):
        for pieces in (Planner.incoming, Planner.outgoing):
            assert Counter(p for part in parts for p in pieces(part, rank)) == Counter(pieces(planner, rank))
        assert all(
            sum(b.length for b in planner.targets[rank][n]) == planner.shape(n)[planner.targets[rank][n][0].dim]
            for n in made
        )


def sources_of(spec, layout: Layout) -> list[dict[str, list[TensorSlice]]]:
    from mrlhf.models.reshard_plan import trainer_shard

    return [trainer_shard(spec, layout, r) for r in range(layout.world)]


def test_every_holder_is_asked_alike_and_the_own_machine_first() -> None:
    """Four replicas of a tensor, two ranks without it: the near ones answer, and not all the same one."""
    block = TensorSlice("w", 0, 0, 8, 0)
    shards = [{"w": [block]}, {}, {"w": [block]}, {}]
    planner = Planner(
        shards,
        [{"v": [block]}] * 4,
        shapes={"w": (8, 4)},
        distance=lambda src, dst: (src // 2 != dst // 2, (src - dst) % 4),
    )
    assert Counter((p.src, p.dst) for r in range(4) for p in planner.incoming(r)) == Counter(
        [(0, 0), (0, 1), (2, 2), (2, 3)]
    )
    assert planner.bytes_of_ranks(4) == [(128, 0, 128), (0, 128, 0), (128, 0, 128), (0, 128, 0)]


def test_buckets_are_bounded() -> None:
    """Of any size: large tensors are cut by rows and columns, small ones share a message."""
    rows, columns = [TensorSlice("a", 0, 0, 64, 0)], [TensorSlice("b", 1, 0, 64, 0)]
    small = {f"s{i}": [TensorSlice(f"s{i}", 0, 0, 1, 0)] for i in range(20)}
    shapes = {"a": (64, 16), "b": (16, 64)} | dict.fromkeys(small, (1,))
    source = {"a": rows, "b": columns, **small}
    planner = Planner([source, {}], [{}, source], shapes=shapes, distance=lambda src, dst: (0,))
    plan = Reshard(planner, rank=1, dtype=torch.float32, bucket_bytes=2048)
    assert plan.received == 4 * (1024 + 1024 + 20) and plan.sent == plan.copied == 0
    assert all(4 * sum(m.numel for m in bucket) <= 1024 for bucket in plan.buckets) and len(plan.buckets) == 9
    small_messages = [m for bucket in plan.buckets for m in bucket if any(p.hf.startswith("s") for p in m.transfers)]
    assert sum(len(m.transfers) for m in small_messages) >= 20 and len(small_messages) <= 2


def test_numbers_that_stay_in_fp32_travel_so() -> None:
    """A bias that chooses experts beside bf16 weights:
    rank 0 sends, rank 1 receives what was sent, whether packed or straight.
    """
    shapes = {"w": (4, 6), "c": (4, 3), "bias": (5,), "other": (3,)}
    shard = {
        hf: [TensorSlice(hf, 1 if hf == "c" else 0, 0, shape[1] if hf == "c" else shape[0], 0)]
        for hf, shape in shapes.items()
    }
    source = {
        hf: torch.randn(shape).to(torch.float32 if hf in ("bias", "other") else torch.bfloat16)
        for hf, shape in shapes.items()
    }
    target = {hf: torch.zeros_like(x) for hf, x in source.items()}
    planner = Planner([shard, {}], [{}, shard], shapes=shapes, distance=lambda src, dst: (0,), wide=("bias", "other"))
    on_the_wire: list[torch.Tensor] = []

    class Arrived:
        def wait(self) -> None:
            """At once."""

    def start(operations: list[tuple[bool, torch.Tensor, int]]) -> list[Arrived]:
        for is_send, data, other in operations:
            assert other == (1 if is_send else 0)
            if is_send:
                on_the_wire.append(data.clone())
            else:
                sent = on_the_wire.pop(0)
                assert sent.dtype == data.dtype
                data.copy_(sent)
        return [Arrived()]

    for bucket_bytes in (64, 4096):
        plans = [
            Reshard(planner, rank=r, dtype=torch.bfloat16, bucket_bytes=bucket_bytes, start_messages=start)
            for r in (0, 1)
        ]
        plans[0].exchange(source, {})
        plans[1].exchange({}, target)
        assert not on_the_wire and all(torch.equal(x, target[hf]) for hf, x in source.items())
        assert plans[0].sent == plans[1].received == 2 * (24 + 12) + 4 * 8 == planner.bytes_of_ranks(2)[1][1]
        for tensor in source.values():
            tensor.mul_(3.0)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("reshard") / "result.json"
    python(TESTS / "models/reshard_program.py", out, ranks=8)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_exchange_equals_gathering_everything(exchanged: dict[str, dict], name: str) -> None:
    found = exchanged[name]
    assert found["wrong"] == [], "differs from the gathered reference, bit for bit"
    assert found["misplaced"] == [], "the plan's idea of the trainer's parameters is not Megatron's"
    assert found["received"] == found["planned"] == found["minimum"]
    assert found["packing"] <= found["bucket"] and found["buckets"] >= found["min_buckets"]
