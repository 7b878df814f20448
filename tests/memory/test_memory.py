"""Running out of memory: who says it and how, and what is then offered.
Whole runs that do: tests/faults/test_kills.py.
"""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mrlhf.checkpoint import manifest
from mrlhf.config.load import load_config
from mrlhf.config.options import ParallelConfig, PPOStage, SFTStage
from mrlhf.errors import OutOfMemory
from mrlhf.memory.advice import remedies
from mrlhf.memory.tracker import Memory, is_out_of_memory, requested_memory
from mrlhf.models.families.spec import Layer, ModelSpec
from mrlhf.training.resume import FREE_TO_CHANGE

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. "
    "GPU 1 has a total capacity of 79.11 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 77.90 GiB memory in use."
)
SPEC = ModelSpec("llama", 4, 64, 128, 4, 2, 16, 320, 128, 1e-6, False, (Layer(),) * 4)


def sft(*more: str) -> SFTStage:
    return load_config(
        SFTStage,
        None,
        ["--model.path", "m", "--data.train", "d", "--train.output_dir", "o", "--train.global_batch_size", "8", *more],
    )


def ppo(*more: str) -> PPOStage:
    needed = [
        "--model.path",
        "m",
        "--data.train",
        "d",
        "--train.output_dir",
        "o",
        "--train.global_batch_size",
        "8",
        "--rollout.batch_size",
        "8",
    ]
    return load_config(PPOStage, None, [*needed, "--reward.sources", "model:rm", *more])


def test_who_says_it_and_what_was_asked_for() -> None:
    """torch and NumPy really refuse; of CUDA the text as torch writes it."""
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpys:
        np.empty(1 << 50, dtype=np.uint8)
    for error in (torchs.value, numpys.value):
        assert is_out_of_memory(error) and requested_memory(str(error)) == "1 PiB more were requested", str(error)
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert requested_memory(CUDA) == "2.5 GiB more were requested, 1.20 GiB of 79.11 GiB are free"
    assert requested_memory("CUDA error: out of memory") == "the requested size is unknown"
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory")) and not is_out_of_memory(
        OSError(errno.ENOSPC, "No space left")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


def test_the_phase_and_its_peaks_are_in_the_error() -> None:
    memory = Memory(sft("--train.micro_batch_size", "4"), spec=SPEC, rank=3, world=1)
    with memory("build"):
        held = torch.ones(64 << 20, dtype=torch.uint8)
    with pytest.raises(OutOfMemory) as found, memory("step", 7):
        torch.empty(1 << 50, dtype=torch.uint8)
    text = str(found.value)
    assert (
        text.startswith("rank 3 (CPU) is out of memory in 'step 7': ")
        and "  fix:      --train.micro_batch_size 2 (now 4)\n" in text
    )
    assert (
        set(memory.peaks) == {"build", "step"} and memory.reserved >= max(memory.peaks.values()) > held.nbytes / 2**30
    )
    with pytest.raises(KeyError), memory("step", 8):
        raise KeyError("another error stays what it is")


def keys(config: SFTStage | PPOStage, phase: str, *, world: int = 1, cuda: bool = True) -> list[str]:
    lines = remedies(config, phase, spec=SPEC, world=world, cuda=cuda)
    advised = [key for line in lines for key in re.findall(r"--(\w+\.\w+)", line)]
    # no remedy needs train.allow_changes: the command with it goes on from the last checkpoint
    assert not [key for key in advised if not key.startswith(FREE_TO_CHANGE)]
    return [line.split()[0].removeprefix("--") for line in lines]


def test_only_what_is_not_in_force_and_fits_is_offered() -> None:
    assert keys(sft(), "step") == [
        "parallel.recompute",
        "parallel.tensor_model_parallel_size",
        "parallel.context_parallel_size",
    ]
    assert (
        keys(sft("--train.micro_batch_size", "6", "--train.global_batch_size", "12"), "evaluate")[0]
        == "train.micro_batch_size"
    )
    assert keys(sft("--train.max_tokens_per_micro_batch", "512"), "step")[0] == "train.max_tokens_per_micro_batch"
    assert keys(sft("--parallel.recompute", "full"), "step")[0] == "parallel.tensor_model_parallel_size"
    cut = sft("--parallel.recompute", "full", "--parallel.tensor_model_parallel_size", "2")
    assert keys(cut, "step", world=2) == ["parallel.sequence_parallel", "parallel.context_parallel_size"], (
        "TP 4 does not divide 2 key/value heads"
    )
    assert keys(
        replace(cut, parallel=ParallelConfig(2, sequence_parallel=True, context_parallel_size=2, recompute="full")),
        "step",
        world=4,
    ) == ["nothing"]
    assert (
        keys(sft("--optim.use_distributed_optimizer", "false"), "build", world=2)[0]
        == "optim.use_distributed_optimizer"
    )
    assert keys(sft("--checkpoint.async_save", "true"), "save") == ["checkpoint.async_save"]


def test_what_is_offered_in_the_phases_of_ppo() -> None:
    offload = [f"offload.{kind}" for kind in ("optimizer", "gradients", "reference", "reward")]
    assert keys(ppo(), "update_actor")[:4] == offload and keys(ppo("--rollout.sleep", "false"), "values")[4:6] == [
        "rollout.sleep",
        "rollout.kv_cache_mib",
    ]
    assert keys(ppo(), "logprobs")[:3] == [offload[0], offload[1], offload[3]], "the reference is needed there"
    assert keys(ppo("--ppo.estimator", "grpo", "--rollout.n", "2"), "update_actor")[:2] == offload[2:], (
        "no other trainer than the one at work"
    )
    assert keys(ppo(), "gen", cuda=False) == ["rollout.kv_cache_mib", "rollout.max_num_seqs", "rollout.placement"]
    assert "ppo.critic_tensor_model_parallel_size" in keys(ppo(), "update_critic") and "parallel.recompute" not in keys(
        ppo(), "values"
    )
    assert keys(ppo("--offload.reward", "true"), "offload") == ["offload.reward"]


def test_a_file_that_cannot_be_hashed_for_want_of_memory_is_no_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"tensors")

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(manifest, "memoryview", full, raising=False)
    with pytest.raises(MemoryError):
        manifest.HashBehind(tmp_path / "file").entry(7)
