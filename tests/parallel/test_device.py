"""Only Megatron sees a torch that works on CPU; what is patched must exist in the installed megatron-core."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run

from mrlhf.errors import EnvironmentProblem
from mrlhf.parallel import device, megatron

CORE = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core")))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is adapted where there is a GPU")


@no_gpu
def test_only_megatron_sees_another_torch() -> None:
    done = run(sys.executable, TESTS / "parallel/device_program.py")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert found["device"] == ["cpu", "gloo"]
    assert not found["cuda_available"] and found["stock_kept"] and found["torch_in_sys_modules"]
    assert found["error_before"] and found["error_after"] == found["error_before"] and found["error_zeros"]
    assert (found["type_outside"], found["type_inside"]) == ("torch.FloatTensor", "torch.cuda.FloatTensor")
    assert found["cuda_inside"] == "cpu"
    assert found["facade"] and found["facade_is_stock_class"] and found["rng"]
    assert found["init_data"] == "<lambda>"
    assert found["queue"] == "queue"


@no_gpu
def test_megatron_imported_too_early_is_an_error() -> None:
    done = run(
        sys.executable,
        "-c",
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('m'); import mrlhf.parallel",
        check=False,
    )
    assert done.returncode and "megatron.core was imported before mrlhf.parallel" in done.stderr


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("tensor_parallel/random.py", r"^def _set_cuda_rng_state\("),
        ("tensor_parallel/random.py", r"^def _get_cuda_rng_state\("),
        ("tensor_parallel/random.py", r"CPU RNG state changed"),
        ("dist_checkpointing/mapping.py", r"^    def init_data\(self, device"),
        ("dist_checkpointing/strategies/torch.py", r"^def _replace_state_dict_keys_with_sharded_keys\("),
        ("models/gpt/gpt_model.py", r"^    def _postprocess\("),
        ("parallel_state.py", r"^def _set_global_memory_buffer\("),
        ("transformer/moe/moe_utils.py", r"^def maybe_move_tensor_to_cpu\("),
        ("dist_checkpointing/strategies/filesystem_async.py", r"^_results_queue = None"),
        ("jit.py", r"torch\.compile"),
        ("optimizer/optimizer.py", r"torch\.cuda\.FloatTensor"),
        ("optimizer/clip_grads.py", r"torch\.cuda\.FloatTensor"),
        ("optimizer/__init__.py", r"USING_PYTORCH_OPTIMIZER"),
        ("optimizer/distrib_optimizer.py", r"HAVE_APEX_OR_TE"),
        ("optimizer/distrib_optimizer.py", r"USING_APEX_OPTIMIZER"),
    ],
)
def test_what_is_patched_exists(file: str, pattern: str) -> None:
    """An upgrade of megatron-core that moves one of these must be noticed here, not in a run."""
    assert re.search(pattern, (CORE / file).read_text(), re.MULTILINE), f"{file} has no {pattern!r} any more"


def test_another_megatron_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(
        EnvironmentProblem,
        match=r"megatron-core 0\.17\.0 is installed; mrlhf is made for 0\.16\.1\n(.*\n)*.*pip install",
    ):
        megatron.check_version()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EnvironmentProblem, match="not installed"):
        megatron.check_version()


def test_forced_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = device.current.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("MRLHF_DEVICE", "cpu")
    assert choose() == device.Device("cpu", "gloo")
    monkeypatch.delenv("MRLHF_DEVICE")
    assert choose() == device.Device("cuda", "nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MRLHF_DEVICE", "cuda")
    with pytest.raises(EnvironmentProblem, match="sees no GPU"):
        choose()
    monkeypatch.setenv("MRLHF_DEVICE", "tpu")
    with pytest.raises(EnvironmentProblem, match="'tpu'"):
        choose()
