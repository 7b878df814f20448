"""train.deterministic: switches are set before what reads them, a user's own stay, and vLLM runs without torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mrlhf.models import gpt
from mrlhf.parallel import device, state
from mrlhf.rl import ppo
from mrlhf.rl.rollout import vllm_engine
from mrlhf.training import run

SWITCHES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "VLLM_BATCH_INVARIANT": "1",
}


class Started(Exception):
    """torch.distributed would start here."""


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in SWITCHES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("cuda", "nccl"))


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    device.make_deterministic()
    assert {name: os.environ[name] for name in SWITCHES} == SWITCHES | {"NCCL_ALGO": "Tree"}
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_cpu_needs_no_variables() -> None:
    device.make_deterministic()
    assert torch.are_deterministic_algorithms_enabled() and not set(SWITCHES) & set(os.environ)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("placement", ["supervised", "colocated", "separate"])
def test_set_before_the_first_group(monkeypatch: pytest.MonkeyPatch, placement: str, wanted: bool) -> None:
    def start(*args: object, **options: object) -> None:
        raise Started(os.environ.get("NCCL_ALGO"))

    on_cuda(monkeypatch)
    monkeypatch.setattr(state, "initialize", start)
    monkeypatch.setattr(ppo, "split_world", start)
    for module in (run, ppo):
        monkeypatch.setattr(module, "check_run" if module is run else "check_ppo", lambda *args, **kwargs: None)
        monkeypatch.setattr(module, "open_directory", lambda config: None)
    monkeypatch.setattr(ppo, "Prompts", lambda *args: None)
    config = SimpleNamespace(
        train=SimpleNamespace(deterministic=wanted, seed=1),
        parallel=SimpleNamespace(timeout_minutes=1, silence_seconds=1),
        rollout=SimpleNamespace(num_ranks=1 if placement == "separate" else None),
    )
    with pytest.raises(Started, match="Ring" if wanted else "None"):
        if placement == "supervised":
            run.SupervisedRun(config, head="lm", count=None)
        else:
            ppo.main(config)
    assert torch.are_deterministic_algorithms_enabled() == wanted


def test_megatron_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.wires_spec import make_spec

    from mrlhf.config.options import ParallelConfig

    modes = []
    for on in (False, True):
        torch.use_deterministic_algorithms(on)
        config = gpt.transformer_config(make_spec(moe=False), ParallelConfig(), dtype=torch.float32)
        modes.append(config.deterministic_mode)
    assert modes == [False, True]


def test_vllm_runs_without() -> None:
    torch.use_deterministic_algorithms(True)
    with pytest.raises(Started), vllm_engine._process_state_restored():
        assert not torch.are_deterministic_algorithms_enabled()
        raise Started
    assert torch.are_deterministic_algorithms_enabled()
