"""A PPO run whose vLLM sleeps as on CUDA: what was on the device at every use of it; writes JSON.

vLLM is the real one on the CPU, which ignores sleep and wake_up; here its weights turn to NaN when it sleeps. Parts of
the trainer that are parked really leave: their storages have no bytes.

usage: owner_program.py OUTPUT.json STEP --section.key VALUE ...    STEP: its rollout is interrupted; 0: none
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS: list[dict[str, Any]] = []
AWAKE: set[str] = set()  # of "weights", "kv_cache"
OWNER: list[Any] = []


def record(name: str) -> None:
    parts = [
        (role, kind, t.untyped_storage().nbytes())
        for owner in OWNER
        for role, entries in owner.parked.items()
        for _, model, kind in entries
        for t in model.tensors(kind)
    ]
    here = sorted({f"{role} {kind}" for role, kind, size in parts if size})
    EVENTS.append({"event": name, "awake": sorted(AWAKE), "here": here, "bytes": sum(size for *_, size in parts)})


def recorded(cls: type, method: str, name: str) -> None:
    """`method` is recorded as it begins and as it ends."""
    own = getattr(cls, method)

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        record(name)
        result = own(*args, **kwargs)
        record(name)
        return result

    setattr(cls, method, call)


def sleeping_vllm() -> None:
    import torch
    import vllm
    import vllm.device_allocator

    from mrlhf.rl.rollout.vllm_engine import VLLMEngine

    start, sleep, wake_up, build = VLLMEngine.__init__, vllm.LLM.sleep, vllm.LLM.wake_up, vllm.LLM.__init__

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.sleeps = True

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        AWAKE.update(("weights", "kv_cache"))
        record("build vllm")
        build(self, *args, **kwargs)

    @torch.no_grad()
    def fall_asleep(self: Any, level: int = 1, **kwargs: Any) -> None:
        assert level == 2
        sleep(self, level=level, **kwargs)
        AWAKE.clear()
        runner = self.llm_engine.model_executor.driver_worker.worker.model_runner
        for parameter in runner.get_model().parameters():
            parameter.fill_(float("nan"))

    def wake(self: Any, tags: list[str]) -> bool:
        AWAKE.update(tags)
        record(f"wake {' '.join(tags)}")
        return wake_up(self, tags)

    class Allocator:
        def get_current_usage(self) -> int:
            return 1 << 30

    VLLMEngine.__init__ = started
    vllm.LLM.__init__, vllm.LLM.sleep, vllm.LLM.wake_up = built, fall_asleep, wake
    vllm.device_allocator.get_mem_allocator_instance = Allocator
    recorded(vllm.LLM, "generate", "vllm generates")


def interrupted(step: int) -> None:
    from mrlhf.rl.ppo import PPO
    from mrlhf.training.stopping import Interrupted

    generate = PPO.generate

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if step and kwargs["step"] == step:  # an evaluation is step 0
            calls = iter(range(10))
            self.sampler.engine.should_stop = lambda: next(calls) == 5
        try:
            return generate(self, *args, **kwargs)
        except Interrupted:  # a generating rank of its own may get weights and requests afterwards
            llm = self.sampler.engine.llm
            assert not llm.llm_engine.has_unfinished_requests() and llm.reset_prefix_cache()
            raise

    PPO.generate = stopped


def main() -> None:
    from mrlhf.checkpoint.manager import Saver
    from mrlhf.config.load import load_config
    from mrlhf.config.options import PPOStage
    from mrlhf.observe import log
    from mrlhf.parallel.weight_update import WeightUpdate
    from mrlhf.rl import ppo
    from mrlhf.rl.offload import Offload
    from mrlhf.training.trainer import Model, Trainer

    log.set_up()
    own: Callable[..., None] = Offload.__init__

    def captured(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        OWNER.append(self)

    Offload.__init__ = captured  # type: ignore[method-assign]
    sleeping_vllm()
    for cls, method, name in (
        (Trainer, "step", "an update"),
        (Trainer, "resume", "a resume"),
        (Model, "forward", "a forward pass"),
        (Saver, "save", "a save"),
        (WeightUpdate, "exchange", "the exchange of weights"),
    ):
        recorded(cls, method, name)
    interrupted(int(sys.argv[2]))
    status = ppo.main(load_config(PPOStage, None, sys.argv[3:]))
    Path(sys.argv[1]).write_text(json.dumps({"status": status, "events": EVENTS}))


if __name__ == "__main__":
    main()
