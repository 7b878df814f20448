"""vLLM's life inside a run: its memory is checked first, its lines are kept,
and a rank that stops in mid-step ends the run by its name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT, environment, metrics

from mrlhf.errors import ConfigError
from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.parallel.watch import EXIT_STATUS
from rl.test_ppo import options, reward_model  # noqa: F401  (a fixture)


def test_memory_is_checked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mrlhf.rl.rollout import vllm_engine

    spec = ModelSpec("qwen2", 2, 1024, 2048, 8, 8, 128, 512, 64, 1e-6, tied=True, layers=(Layer(),) * 2)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        monkeypatch.setattr(vllm_engine, "_free_bytes", lambda: 200 << 20)
        budget = vllm_engine.check_vllm_memory(spec, dtype="float32", tp=1, kv_cache_mib=64)
        assert budget.cache == 64 << 20 and budget.weights == pytest.approx(spec.num_parameters * 4, rel=0.01)
        with pytest.raises(
            ConfigError,
            match=r"vLLM does not fit: 0.08 GiB of weights and 0.20 GiB of cache on each rank, 0.20 GiB were free",
        ) as caught:
            vllm_engine.check_vllm_memory(spec, dtype="float32", tp=1, kv_cache_mib=200)
        room = (200 << 20) - budget.weights >> 20
        assert caught.value.expected == f"at most {room}" and caught.value.fix == f"--rollout.kv_cache_mib {room // 2}"
        with pytest.raises(ConfigError) as caught:
            vllm_engine.check_vllm_memory(spec, dtype="float32", tp=1, kv_cache_mib=10**9)
        monkeypatch.setattr(vllm_engine, "_free_bytes", lambda: 1 << 20)
        with pytest.raises(ConfigError) as caught:
            vllm_engine.check_vllm_memory(spec, dtype="float32", tp=1, kv_cache_mib=1)
        assert "tensor-parallel" in caught.value.expected and caught.value.fix is None
    finally:
        dist.destroy_process_group()


def process_of_rank(launcher: int, rank: int) -> int:
    """The rank's process under a torchrun."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == launcher and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    return int(entry.name)
            except (OSError, IndexError):
                continue
    raise AssertionError(f"no process of rank {rank}")


def test_a_stopped_rank_ends_the_run_by_its_name(world: Path, reward_model: Path, tmp_path: Path) -> None:  # noqa: F811
    """Both ranks make up one vLLM replica: its shared memory has no time-out of its own."""
    changes = {
        "parallel.tensor_model_parallel_size": 2,
        "rollout.tensor_parallel_size": 2,
        "train.output_dir": tmp_path,
        "train.max_steps": 10_000,
        "train.num_epochs": 10_000,
        "parallel.silence_seconds": 5,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "-m", "mrlhf", "ppo",
               *options(world, reward_model, **changes)]  # fmt: skip
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
    stopped = None
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "metrics.jsonl").is_file() or not metrics(tmp_path):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()[-4000:]
            time.sleep(0.2)
        stopped = process_of_rank(launcher.pid, 1)
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        while "RankProblem" not in (tmp_path / "out.txt").read_text():
            assert time.monotonic() - start < 30, "rank 0 still waits"
            time.sleep(0.2)
        os.kill(stopped, signal.SIGKILL)  # torchrun itself gives it 30 seconds to answer to SIGTERM
        assert launcher.wait(timeout=30) != 0
    finally:
        launcher.kill()
        if stopped is not None:
            os.system(f"kill -9 {stopped} 2>/dev/null")
    text = (tmp_path / "out.txt").read_text()
    assert f"pid {stopped}) has given no sign of life" in text and "of step" in text.split("RankProblem")[1]
    assert f"exitcode  : {EXIT_STATUS}" in text
    assert "rank 0: sends" in text and "GiB of cache on each rank" in text, (
        "bytes of the plan and vLLM's memory are stated at the start"
    )
    assert "[INFO]" not in text and "vllm" not in text.split("RankProblem")[0].lower().replace(
        "vllm: 1 replica", ""
    ).replace("--rollout", "")
    assert (tmp_path / "logs/stacks_rank_0.txt").is_file()
    assert "KV cache" in (tmp_path / "logs/vllm_rank_0.log").read_text()
