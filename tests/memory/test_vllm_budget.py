"""vLLM's part of a card: what it needs, and the cache that is left. The engine's use of it: tests/rl/rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mrlhf.config.load import load_config
from mrlhf.config.options import PPOStage
from mrlhf.memory import tracker
from mrlhf.memory.advice import remedies
from mrlhf.memory.tracker import Memory
from mrlhf.memory.vllm_budget import CPU_CACHE_MIB, RESERVE, cache_bytes, cache_on_a_card, plan_vllm
from mrlhf.models.families.spec import Experts, Latent, Layer, ModelSpec
from mrlhf.parallel import device

GIB = 2**30
LLAMA_8B = ModelSpec("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, False, (Layer(),) * 32)
CARD = {"free": 60 * GIB, "room": 60 * GIB, "total": 80 * GIB}
SIZES = {"dtype": "bfloat16", "tp": 1, "max_num_seqs": 256, "max_model_len": 4096}


def ppo(*more: str) -> PPOStage:
    needed = {"model.path": "m", "data.train": "d", "train.output_dir": "o", "train.global_batch_size": 8,
              "rollout.batch_size": 8, "reward.sources": "f.py:f"}  # fmt: skip
    return load_config(PPOStage, None, [str(x) for k, v in needed.items() for x in (f"--{k}", v)] + list(more))


def test_the_cache_takes_what_is_left_of_a_card_and_can_be_used() -> None:
    plan = plan_vllm(LLAMA_8B, kv_cache_mib=None, **SIZES, **CARD)
    assert plan.weights == pytest.approx(LLAMA_8B.num_parameters * 2, rel=0.01)
    assert plan.taken + RESERVE * plan.total == pytest.approx(plan.free, abs=1 << 20) and plan.cache > 30 * GIB
    # the trainer will need 10 GiB of it
    assert plan_vllm(LLAMA_8B, kv_cache_mib=None, **SIZES, **{**CARD, "room": 50 * GIB}).cache == plan.cache - 10 * GIB
    # 128 KiB a token: short answers cannot fill the card
    short = plan_vllm(LLAMA_8B, kv_cache_mib=None, **{**SIZES, "max_model_len": 240, "max_num_seqs": 64}, **CARD)
    assert (
        short.cache == 64 * (240 + 16) * 128 * 1024
        and cache_bytes(LLAMA_8B, dtype="bfloat16", tp=4, tokens=1) == 1 << 15
    )
    # two models that do not fit leave nothing, not less
    assert plan_vllm(LLAMA_8B, kv_cache_mib=None, **SIZES, free=GIB, room=GIB, total=80 * GIB).cache == 0
    # a larger sampler and communicators of a tensor-parallel group take from it
    assert plan_vllm(LLAMA_8B, kv_cache_mib=None, **{**SIZES, "max_num_seqs": 1024}, **CARD).cache < plan.cache
    two = plan_vllm(LLAMA_8B, kv_cache_mib=None, **{**SIZES, "tp": 2}, **CARD)
    assert two.libraries > plan.libraries and two.work < plan.work
    given = plan_vllm(LLAMA_8B, kv_cache_mib=512, **SIZES, **CARD)
    assert given.cache == 512 << 20
    on_cpu = plan_vllm(LLAMA_8B, kv_cache_mib=None, **SIZES, free=60 * GIB, room=60 * GIB, total=0)
    assert (on_cpu.cache, on_cpu.work, on_cpu.libraries) == (CPU_CACHE_MIB << 20, 0, 0)


def test_a_token_in_the_cache() -> None:
    """Windows are kept alone, and latent attention as keys and values of every head."""
    windows = replace(LLAMA_8B, layers=(Layer(), Layer(window=100)) * 16)
    whole, half = (cache_bytes(s, dtype="float32", tp=1, tokens=200) for s in (LLAMA_8B, windows))
    assert whole == 32 * 200 * 2 * 8 * 128 * 4 and half == whole * 3 // 4
    assert cache_bytes(windows, dtype="float32", tp=16, tokens=200) == half // 8, "a head is not cut"
    latent = replace(LLAMA_8B, latent=Latent(512, None, 128, 64), num_query_groups=32)
    assert cache_bytes(latent, dtype="bfloat16", tp=2, tokens=1) == 32 * 2 * 16 * 192 * 2


def test_experts_need_their_tokens_copies() -> None:
    dense = plan_vllm(LLAMA_8B, kv_cache_mib=1, **SIZES, **CARD).work
    moe = replace(LLAMA_8B, experts=Experts(64, 8, 14336), layers=(Layer(moe=True),) * 32)
    assert plan_vllm(moe, kv_cache_mib=1, **SIZES, **CARD).work > dense + 8192 * 8 * 2 * 14336 * 2


def test_the_dry_run_counts_what_stays_on_the_card() -> None:
    def cache(*more: str, critic: bool = True) -> float:
        config = ppo("--rollout.tensor_parallel_size", "8", "--parallel.tensor_model_parallel_size", "8",
                     "--rollout.max_num_seqs", "1024", *more)  # fmt: skip
        others = {"critic": LLAMA_8B} if critic else {}
        size = cache_on_a_card(config, LLAMA_8B, world=8, others=others, tokens=100_000, update=7 * GIB, card=80 * GIB)
        return size / GIB

    parameters = LLAMA_8B.num_parameters / 8 / GIB
    alone = cache("--rollout.placement", "separate", "--rollout.num_ranks", "8")
    colocated = cache()
    assert alone - colocated == pytest.approx(parameters * (18 + 18 + 2), rel=0.02), "actor, critic, reference"
    assert cache("--kl.coef", "0") - colocated == pytest.approx(parameters * 2, rel=0.02)
    assert cache("--offload.optimizer", "true") - colocated == pytest.approx(parameters * 24, rel=0.02)
    assert cache("--offload.gradients", "true") - colocated == pytest.approx(parameters * 8, rel=0.02)
    everything = [x for kind in ("optimizer", "gradients", "reference") for x in (f"--offload.{kind}", "true")]
    assert alone - cache(*everything) == pytest.approx(parameters * 4, rel=0.02), "two models' weights stay"
    assert cache(*everything, "--rollout.sleep", "false") == pytest.approx(colocated - 7, rel=0.02)


def test_a_cache_of_what_is_free_gets_a_remedy() -> None:
    spec = replace(LLAMA_8B, num_layers=4, layers=(Layer(),) * 4)
    lines = remedies(ppo(), "gen", spec=spec, world=1, cuda=True)
    assert "--rollout.kv_cache_mib 1024 (now unset: all that was free at the start)" in lines
    assert f"--rollout.kv_cache_mib {CPU_CACHE_MIB // 2} (now {CPU_CACHE_MIB})" in remedies(
        ppo(), "gen", spec=spec, world=1, cuda=False
    )


def test_memory_of_a_vllm_that_sleeps_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts vLLM's pool as allocated all the time; the driver knows what is mapped."""
    at = {"allocated": 10 * GIB, "free": 70 * GIB}
    for name, value in {
        "max_memory_allocated": lambda: at["allocated"],
        "max_memory_reserved": lambda: at["allocated"] + GIB,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda: (at["free"], 80 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(device, "current", lambda: device.Device("cuda", "nccl"))
    monkeypatch.setattr(tracker.device, "current", lambda: device.Device("cuda", "nccl"))
    memory = Memory(ppo(), spec=LLAMA_8B, rank=0, world=1)
    with memory("gen", 1):  # awake with 40 GiB beside the trainer's 10; it sleeps as the phase ends
        at.update(allocated=50 * GIB, free=30 * GIB)
        memory.sample_device()
        at["free"] = 70 * GIB
        memory.hide(40 * GIB)
    assert memory.peaks == {"gen": 50.0} and memory.device_peak == 50.0
    with memory("update_actor", 1):
        at.update(allocated=65 * GIB, free=55 * GIB)
    assert memory.peaks["update_actor"] == 25.0 and memory.device_peak == 50.0
    with memory("evaluate", 1):  # it wakes and sleeps again
        memory.hide(0)
        memory.hide(40 * GIB)
    assert memory.peaks["evaluate"] == 65.0
    memory.device_peak = 0.0
    with memory("reshard", 1):
        memory.hide(0)
        at["free"] = 20 * GIB
    assert memory.peaks["reshard"] == 65.0 and memory.device_peak == 60.0 and memory.reserved == 66.0
