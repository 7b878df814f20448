"""The ways out of a run: what is under way is completed first, and torch's default group ends last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from mrlhf.errors import OutOfMemory, RewardError
from mrlhf.observe import heartbeat
from mrlhf.parallel import state
from mrlhf.rl.ppo import PPO
from mrlhf.training.phases import Phases


def test_a_ppo_run_ends_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's end destroys torch's default group, which a save in the background needs; the lock is held to the end."""
    order: list[str] = []

    def part(name: str) -> Any:
        return lambda *_: order.append(name)

    monkeypatch.setattr(heartbeat, "stop_beating", part("heartbeat"))
    monkeypatch.setattr(state, "shutdown", part("group"))
    run: Any = object.__new__(PPO)
    run.saver = SimpleNamespace(finish=part("save"), failed_exports=[])
    run.rewards, run.sampler = SimpleNamespace(close=part("rewards")), SimpleNamespace(shutdown=part("vllm"))
    run.tracker, run._lock = SimpleNamespace(close=part("tracker")), SimpleNamespace(release=part("lock"))
    run.finished, run.bridge, run.status, run.closing_line = False, None, 0, "finished"
    assert run.close() == 0
    assert order == ["save", "rewards", "vllm", "tracker", "heartbeat", "group", "lock"]


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("error", [OSError("a disk"), SystemExit(3), KeyboardInterrupt(), RewardError("a reward")])
def test_whatever_ends_a_run_of_one_rank_its_save_is_completed(alone: None, error: BaseException) -> None:
    """Of several ranks only an error that all of them raise: the others would wait for a rank that is elsewhere."""
    for ranks, completes in ((1, True), (2, getattr(error, "on_all_ranks", False))):
        ended: list[str] = []
        memory: Any = lambda name, step: contextlib.nullcontext()  # noqa: E731
        phase = Phases(memory, before_end=lambda: ended.append("save"))  # noqa: B023
        with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(dist, "get_world_size", lambda: ranks)  # noqa: B023
            with phase("gen", 3):
                raise error
        assert ended == ["save"] * completes, ranks


def test_out_of_memory_completes_the_save_before(alone: None) -> None:
    ended: list[str] = []
    memory: Any = lambda name, step: contextlib.nullcontext()  # noqa: E731
    with pytest.raises(OutOfMemory), Phases(memory, before_end=lambda: ended.append("save"))("update_actor", 9):
        raise OutOfMemory("rank 0 is out of memory", peaks={}, remedies=[])
    assert ended == ["save"]
