"""vLLM's start beside a trainer on a card: its share of the memory is what it needs, and the cache is what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TESTS, python

from mrlhf.errors import ConfigError
from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.parallel import device

GIB = 2**30
SPEC = ModelSpec("qwen2", 2, 1024, 2048, 8, 8, 128, 512, 64, 1e-6, tied=True, layers=(Layer(),) * 2)


def test_vllm_accepts_its_share_beside_a_trainer(world: Path) -> None:
    """Its default is 0.92 of the card, of which a trainer always holds a part."""
    done = python(TESTS / "rl/rollout/start_program.py", world / "qwen2", vllm=True)
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert result["default"] > 0.9 and result["backend"] and result["largest batch"] == 8192
    requested = {int(held): one for held, one in result["starts"].items()}
    assert list(requested) == [4, 8, 18, 44]
    for held, (share, cache) in requested.items():
        assert 15 + cache < share < 79 - held, "weights, cache and what vLLM works with, and no more than is there"
    assert requested[4][1] > 50 > 20 > requested[44][1] > 5


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """A CUDA device of 80 GiB for check_vllm_memory: its collective stays on the CPU."""
    from mrlhf.rl.rollout import vllm_engine

    size = {"free": 60 * GIB}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    own = torch.tensor
    monkeypatch.setattr(vllm_engine.torch, "tensor", lambda *args, device, **more: own(*args, **more))
    monkeypatch.setattr(device, "current", lambda: device.Device("cuda", "nccl"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (size["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield size
    monkeypatch.undo()
    dist.destroy_process_group()


def test_everything_that_vllm_takes_of_a_card_is_counted(card: dict[str, int]) -> None:
    from mrlhf.rl.rollout.vllm_engine import check_vllm_memory

    sizes = {"dtype": "bfloat16", "tp": 1, "max_model_len": 64}
    plan = check_vllm_memory(SPEC, kv_cache_mib=None, **sizes)
    assert plan.taken < card["free"] and "GiB to work with and" in plan.summary()
    # the cache and the weights alone would fit
    most = card["free"] - plan.weights - plan.work - plan.libraries >> 20
    check_vllm_memory(SPEC, kv_cache_mib=most, **sizes)
    with pytest.raises(ConfigError, match="vLLM does not fit") as caught:
        check_vllm_memory(SPEC, kv_cache_mib=most + 1, **sizes)
    assert caught.value.expected == f"at most {most}"
    # what the trainer will take later is not vLLM's
    with pytest.raises(ConfigError, match="of which the trainer will need 2.00 GiB") as caught:
        check_vllm_memory(SPEC, kv_cache_mib=most, to_come=2 * GIB, **sizes)
    assert caught.value.expected == f"at most {most - 2048}"
    # a cache that cannot hold one answer
    with pytest.raises(ConfigError) as caught:
        check_vllm_memory(SPEC, kv_cache_mib=1, **{**sizes, "max_model_len": 4096})
    assert caught.value.expected == "at least 32, for one answer"
    check_vllm_memory(SPEC, kv_cache_mib=32, **{**sizes, "max_model_len": 4096})
    # nothing is left of 3 GiB once the reserve is kept, but a cache that is asked for fits
    card["free"] = 3 * GIB
    with pytest.raises(ConfigError) as caught:
        check_vllm_memory(SPEC, kv_cache_mib=None, **sizes)
    most = 3 * GIB - plan.weights - plan.work - plan.libraries >> 20
    assert (caught.value.expected, caught.value.fix) == (f"at most {most}", f"--rollout.kv_cache_mib {most // 2}")
    check_vllm_memory(SPEC, kv_cache_mib=most // 2, **sizes)
    card["free"] = 1 * GIB
    with pytest.raises(ConfigError) as caught:
        check_vllm_memory(SPEC, kv_cache_mib=1, **sizes)
    assert "offload" in caught.value.expected and caught.value.fix is None
