"""data.verify: hash finds what sizes and ranges cannot, before the first step and on every rank."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import mrlhf

from mrlhf.config.options import (
    DataConfig,
    DataSource,
    ModelConfig,
    PPOStage,
    PTXConfig,
    RolloutConfig,
    SFTStage,
    TrainConfig,
    TrainingConfig,
)
from mrlhf.data.megatron_text import is_megatron
from mrlhf.data.writer import IndexedWriter
from mrlhf.errors import DataError, SeveralErrors
from mrlhf.training.preflight import verify_data


def copied(world: Path, name: str, to: Path) -> Path:
    for file in world.glob(f"{name}.*"):
        shutil.copy(file, to)
    for file in world.glob(f"{name}_l*"):
        shutil.copy(file, to)
    return to / name


def flip(path: Path) -> None:
    """Another sound value of the same size: an id of 1 more, or a mask's 1 for its 0."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def config(*train: Path, evaluation: Path | None = None, ptx: Path | None = None, how: str = "hash") -> TrainingConfig:
    data = DataConfig(train=tuple(DataSource(str(prefix)) for prefix in train), eval=evaluation and str(evaluation),
                      verify=how)  # fmt: skip
    parts = {"model": ModelConfig(path="m"), "data": data, "train": TrainConfig(output_dir="o", global_batch_size=1)}
    if ptx is None:
        return SFTStage(**parts)
    needed = [f.name for f in dataclasses.fields(RolloutConfig) if f.default is dataclasses.MISSING]
    rollout = RolloutConfig(**dict.fromkeys(needed, 8))
    return PPOStage(**parts, rollout=rollout, ptx=PTXConfig(data=str(ptx), coef=1.0))


def test_every_set_of_a_run_is_hashed(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats, pairs, prompts, text = (copied(world, name, tmp_path) for name in ("sft", "pref", "prompts", "text"))
    whole = config(chats, pairs, evaluation=text, ptx=prompts)
    verify_data(whole)
    for path in ("pref_loss_mask.bin", "text.bin", "prompts_labels.jsonl"):
        flip(tmp_path / path)
    verify_data(config(chats, pairs, evaluation=text, how="size"))
    with pytest.raises(SeveralErrors) as caught:
        verify_data(whole)
    assert {e.where for e in caught.value.errors} == {
        f"{tmp_path}/{name}" for name in ("pref_loss_mask.bin", "text.bin", "prompts_labels.jsonl")
    }
    (tmp_path / "sft.bin").write_bytes((world / "sft.bin").read_bytes()[::-1])  # as long, with the same ids
    with pytest.raises(DataError, match="checksum differs") as one:
        verify_data(config(chats))
    assert one.value.where == f"{tmp_path}/sft.bin"


def test_data_without_hashes_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = IndexedWriter(tmp_path / "x_text_document.bin", tmp_path / "x_text_document.idx", np.dtype("int32"))
    writer.add_documents(np.arange(4), [4], [1])
    writer.close()
    assert is_megatron(str(tmp_path / "x_text_document"))
    with caplog.at_level("INFO"):
        verify_data(config(tmp_path / "x_text_document"))
    assert "holds no hashes" in caplog.text


def test_all_ranks_end_for_what_one_of_them_hashed(world: Path, tmp_path: Path) -> None:
    prefix = copied(world, "sft", tmp_path)
    flip(tmp_path / "sft_loss_mask.bin")  # hashed by the second rank, shown by the first
    args = ("sft", "--model.path", world / "qwen2", "--data.train", prefix, "--train.global_batch_size", 2,
            "--train.max_steps", 1, "--train.output_dir", tmp_path / "run", "--data.verify", "hash")  # fmt: skip
    done = mrlhf(*args, ranks=2, check=False)
    assert done.returncode != 0 and "sft_loss_mask.bin: checksum differs" in done.stderr
    assert "[rank 1]" not in done.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()
    dry = mrlhf(*args, "--dry-run", check=False)
    assert dry.returncode == 2 and "sft_loss_mask.bin: checksum differs" in dry.stderr
