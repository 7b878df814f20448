"""What ranks exchange in a step on CUDA, and where their hosts wait for it: rehearsed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product

import pytest
from conftest import TESTS, python
from parallel.nccl import standing_still

from cuda.wires_spec import CASES, DETERMINISTIC, HIDDEN
from mrlhf.parallel.planner import Message

NORM = "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32"
METRICS = "mrlhf/training/trainer.py:_reduce"
# layers and heads have their own tests
OURS = ("megatron/core/distributed", "megatron/core/optimizer", "megatron/core/pipeline", "megatron/core/utils",
        "mrlhf/training", "mrlhf/parallel", "mrlhf/dpo", "mrlhf/data")  # fmt: skip
# Deterministic, these raise on a GPU (torch's documentation): of cumsum that of numbers that are no integers.
REFUSED = ("nll_loss", "histc", "bincount", "cumsum", "median", "put_.", "kthvalue", "embedding_bag", "scatter_reduce",
           "embedding_dense_backward")  # fmt: skip


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("wires") / "result.json"
    python(TESTS / "cuda/wires_program.py", out, device="rehearsal", timeout=600)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_messages_pair_and_none_tells_a_shape(rehearsed: dict[str, dict], name: str) -> None:
    assert rehearsed[name]["unpaired"] == []
    how = CASES[name][0]
    stages = how.get("pipeline_model_parallel_size", 1)
    parts = how.get("context_parallel_size", 1) * (how["tensor_model_parallel_size"] if "sequence" in str(how) else 1)
    for messages, rank in zip(rehearsed[name]["messages"], CASES[name][1], strict=True):
        between = [m for m in messages if m["peer"] is not None and m["phase"] == "step"]
        assert bool(between) == (stages > 1)
        sizes = Counter(m["nbytes"] for m in between)
        tokens = [64, 72, 120, 80]  # of the packed micro-batches, padded to a multiple of 8
        hidden = {count * HIDDEN * 2 // parts for count in tokens}
        assert set(sizes) == (hidden if stages > 1 else set()), (name, rank)
        assert len(set(sizes.values())) <= 1, "each micro-batch takes the same ways"


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_once_for_the_norm_and_once_for_metrics(rehearsed: dict[str, dict], name: str) -> None:
    world_of_stages = 8 // CASES[name][0].get("pipeline_model_parallel_size", 1)
    for (waits, rank), phase in product(zip(rehearsed[name]["waits"], CASES[name][1], strict=True), ("step ", "dpo ")):
        of_step = {
            key.removeprefix(phase): n for key, n in waits.items() if key.startswith(tuple(phase + p for p in OURS))
        }
        is_last = rank >= 8 - world_of_stages
        assert of_step == {NORM: 1} | ({METRICS: 1} if is_last else {}), name
        forward_only = {
            k for k in waits if k.startswith(tuple(f"{of} {p}" for of in ("evaluate", "logprobs") for p in OURS))
        }
        assert forward_only == ({f"evaluate {METRICS}"} if is_last else set())


def test_groups_of_messages_between_stages_end(rehearsed: dict[str, dict]) -> None:
    """Megatron's batches under NCCL's rule, of all ranks of a pipeline."""
    ranks = CASES["pp 4"][1]
    counts: Counter[tuple[int, int, bool]] = Counter()
    buckets: list[list[list[Message]]] = [[] for _ in ranks]
    for stage, groups in enumerate(rehearsed["pp 4"]["groups"]):
        for group in groups:
            buckets[stage].append([])
            for is_send, other in group:
                pair = (stage, ranks.index(other)) if is_send else (ranks.index(other), stage)
                counts[*pair, is_send] += 1
                buckets[stage][-1].append(Message((counts[*pair, is_send],), *pair, ()))
    assert sum(map(len, buckets)) > 100 and standing_still(buckets) == 0


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_torch_refuses_no_operation_of_a_deterministic_step(rehearsed: dict[str, dict], name: str) -> None:
    operations = {o.removeprefix("aten.") for o in rehearsed[name]["operations"]}
    assert "mm.default" in operations
    assert not [o for o in operations if o.startswith(REFUSED)], operations
