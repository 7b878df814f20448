"""Only Megatron sees a torch that works on CPU; what is patched must exist in the installed megatron-core."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
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


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., device.Device]:
    """`device.current` on a machine with these device files, driver and build of torch, where torch sees no GPU."""

    def one(files: tuple[str, ...] = (), *, build: str | None = "13.0", warns: bool = True,
            hip: str | None = None, **env: str) -> device.Device:  # fmt: skip
        monkeypatch.setattr(torch.version, "hip", hip)
        names = "MRLHF_DEVICE CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES"
        for name in names.split():
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        dev, proc = tmp_path / "dev", tmp_path / "proc"
        shutil.rmtree(tmp_path)
        (proc / "driver/nvidia").mkdir(parents=True)
        dev.mkdir()
        for name in files:
            (dev / name).touch()
        text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 2021\nGCC version:  gcc 9.3.0\n"
        (proc / "driver/nvidia/version").write_text(text)

        def unavailable() -> bool:
            if warns:
                warnings.warn("The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
            return False

        def init() -> None:
            raise RuntimeError("No CUDA GPUs are available")

        monkeypatch.setattr(torch.cuda, "init", init)

        monkeypatch.setattr(torch.cuda, "is_available", unavailable)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(device.gpu_files, "__defaults__", (dev, dev))
        monkeypatch.setattr(device._unusable_gpu, "__defaults__", (proc,))
        return device.current.__wrapped__()

    return one


CPU = device.Device("cpu", "gloo")


def test_forced_devices(monkeypatch: pytest.MonkeyPatch, choose: Callable[..., device.Device]) -> None:
    assert choose(("nvidia0",), MRLHF_DEVICE="cpu") == CPU
    with pytest.raises(EnvironmentProblem, match="MRLHF_DEVICE = cuda, and torch sees no GPU: driver 470.57.02"):
        choose(MRLHF_DEVICE="cuda")
    with pytest.raises(EnvironmentProblem, match="'tpu'"):
        choose(MRLHF_DEVICE="tpu")
    monkeypatch.delenv("MRLHF_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.current.__wrapped__() == device.Device("cuda", "nccl")


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(choose: Callable[..., device.Device]) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        choose(("nvidia0", "nvidiactl"))
    text = str(caught.value)
    assert "nvidia0" in text and "driver 470.57.02" in text and f"torch {torch.__version__} (for CUDA 13.0)" in text
    assert "too old (found version 11040)" in text and "MRLHF_DEVICE=cpu" in text
    with pytest.raises(EnvironmentProblem, match=r"for the CPU only\).*\n.*a build of torch for the GPU"):
        choose(("nvidia12",), build=None)
    for files in (("dxg", "libcuda.so.1"), ("nvidia0", "nvidia1")):
        with pytest.raises(EnvironmentProblem, match="torch cannot use it"):
            choose(files, NVIDIA_VISIBLE_DEVICES="all", CUDA_VISIBLE_DEVICES="0,1")


def test_where_no_gpu_is_meant_the_cpu_is_taken(choose: Callable[..., device.Device]) -> None:
    assert choose() == CPU
    assert choose(NVIDIA_VISIBLE_DEVICES="all", NVIDIA_DRIVER_CAPABILITIES="compute,utility") == CPU  # CUDA's images
    assert choose(("nvidiactl", "nvidia-uvm", "nvidia-caps", "kfd", "null")) == CPU  # a driver without a GPU
    assert choose(("dxg",)) == CPU  # Windows' subsystem for Linux on a machine without NVIDIA's driver
    for hidden in ("", " ", "-1", "NoDevFiles", "none", "void", "-1,0"):
        assert choose(("nvidia0",), CUDA_VISIBLE_DEVICES=hidden) == CPU
    for hidden in ("void", "none", ""):
        assert choose(("nvidia0",), NVIDIA_VISIBLE_DEVICES=hidden) == CPU


def test_the_reason_is_shown_where_torch_has_warned_before(choose: Callable[..., device.Device]) -> None:
    """torch counts devices once a process: a library that asked first has had the warning."""
    with pytest.raises(EnvironmentProblem, match="No CUDA GPUs are available"):
        choose(("nvidia0",), warns=False, CUDA_VISIBLE_DEVICES="7")
    with pytest.raises(EnvironmentProblem, match=r"\(for the CPU only\)\n"):  # there the build is the reason
        choose(("nvidia0",), warns=False, build=None)


def test_amd_gpus(choose: Callable[..., device.Device]) -> None:
    with pytest.raises(EnvironmentProblem, match=r"there is a GPU \(.*kfd\).*\(for ROCm 7\.1\)"):
        choose(("kfd",), build=None, hip="7.1")
    for hidden in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        assert choose(("kfd",), build=None, hip="7.1", **{hidden: "-1"}) == CPU


@pytest.mark.parametrize("given", ["0", "0,1", "GPU-8932f937", "MIG-41b36c3b"])
def test_a_gpu_that_was_given_and_did_not_arrive(choose: Callable[..., device.Device], given: str) -> None:
    """A container that was promised a GPU, under a runtime that does not mount it."""
    with pytest.raises(EnvironmentProblem, match=f"NVIDIA_VISIBLE_DEVICES = {given} gives this process a GPU"):
        choose(NVIDIA_VISIBLE_DEVICES=given)
    assert choose(NVIDIA_VISIBLE_DEVICES=given, CUDA_VISIBLE_DEVICES="") == CPU


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`take_gpu` on a node with GPUs of a capability under a torch with kernels for `built`: the device it sets."""

    def one(count: int, *, capability: tuple[int, int] = (9, 0), built: str = "sm_80 sm_90", **env: str) -> list[int]:
        taken: list[int] = []
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(device, "current", lambda: device.Device("cuda", "nccl"))
        for name, value in {"device_count": count, "get_device_name": "NVIDIA X", "get_arch_list": built.split(),
                            "get_device_capability": capability}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        device.take_gpu()
        return taken

    return one


def test_a_rank_takes_its_gpu(gpus: Callable[..., list[int]]) -> None:
    assert gpus(1) == [0]
    assert gpus(8, LOCAL_RANK="5", LOCAL_WORLD_SIZE="8") == [5]
    assert gpus(8, LOCAL_RANK="3") == [3]  # without torchrun


@pytest.mark.parametrize("rank", ["0", "1", "3"])
def test_fewer_gpus_than_ranks_is_an_error_on_every_rank(gpus: Callable[..., list[int]], rank: str) -> None:
    """Also on those that have one: they would wait for the others."""
    with pytest.raises(EnvironmentProblem, match=r"4 ranks on this node, and torch sees 2 GPU\(s\) \(CUDA_VIS.* = 0,1"):
        gpus(2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="4", CUDA_VISIBLE_DEVICES="0,1")


@pytest.mark.parametrize(
    ("capability", "built", "usable"),
    [
        ((9, 0), "sm_80 sm_90a", True),
        ((8, 9), "sm_80 sm_86 sm_90", True),
        ((12, 0), "sm_80 sm_90 compute_90", True),  # compiled by the driver from what 9.0 can do
        ((10, 3), "sm_90 sm_100 sm_120", True),
        ((12, 0), "sm_80 sm_90 sm_100", False),
        ((7, 0), "sm_75 sm_80 compute_75", False),
        ((8, 0), "sm_86 sm_90", False),
        ((9, 4), "gfx942", True),  # AMD's, which torch names otherwise
    ],
)
def test_a_torch_without_kernels_for_the_gpu(
    gpus: Callable[..., list[int]], capability: tuple[int, int], built: str, usable: bool
) -> None:
    if usable:
        assert gpus(1, capability=capability, built=built) == [0]
    else:
        with pytest.raises(EnvironmentProblem, match=r"NVIDIA X has compute capability \d+\.\d, torch .* kernels for"):
            gpus(1, capability=capability, built=built)
