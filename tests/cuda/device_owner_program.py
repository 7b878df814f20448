"""The turns of trainer and vLLM on one card of 8, every byte counted; prints JSON.

The trainer is the real one on fake tensors. vLLM is a stand-in that takes what its plan says: the plan is the real one,
from what is free.

usage: device_owner_program.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30


def rehearse(*, sleeps: bool, parks: bool) -> dict[str, Any]:
    import numpy as np
    import torch

    from mrlhf.checkpoint.source import ModelSource
    from mrlhf.config.options import OffloadConfig, OptimConfig, ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.memory.activations import MicroBatchShape, stage_activations
    from mrlhf.models.families.spec import Layer, ModelSpec
    from mrlhf.parallel import state
    from mrlhf.parallel.rehearsal import Rehearsal
    from mrlhf.rl.offload import Offload
    from mrlhf.rl.rollout.vllm_engine import check_vllm_memory
    from mrlhf.sft import language_model_loss
    from mrlhf.training.trainer import Model, Trainer

    spec = ModelSpec("llama", 8, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, False, (Layer(),) * 8)
    parallel, tokens = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), 4096
    source = ModelSource(Path(), Path(), spec, "lm", {})
    rng = np.random.default_rng(0)
    batch = collate([Sample(rng.integers(3, 300, tokens), np.ones(tokens, np.uint8), 0)], packing=True, pad_multiple=8)
    turns: list[dict[str, Any]] = []

    class VLLM:
        def __init__(self, to_come: int) -> None:
            self.sleeps = sleeps
            self.plan = check_vllm_memory(spec, dtype="bfloat16", tp=1, kv_cache_mib=None, max_num_seqs=1024,
                                          max_model_len=100_000, to_come=to_come)  # fmt: skip
            self.held = self._take(self.plan.weights + self.plan.work + self.plan.libraries + self.plan.cache)

        def _take(self, nbytes: int) -> torch.Tensor | None:
            return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

        def write_weights(self, parameters: Any) -> tuple[float, float]:
            if self.held is None:
                self.held = self._take(self.plan.taken)
            return 0.0, 0.0

        def sleep(self) -> int:
            self.held = None
            return self.plan.taken

    with Rehearsal(rank=3, world=8) as rehearsal:
        state.initialize(parallel, seed=1)

        def turn(name: str) -> None:
            parts = {role: [parking.is_away for parking, *_ in entries] for role, entries in owner.parked.items()}
            awake = vllm.held is not None
            turns.append({"turn": name, "awake": awake, "parked": parts, "live": meter.live / GIB})

        with rehearsal.tracing("build") as meter:
            common: dict[str, Any] = {"dtype": "bfloat16", "seed": 1}
            actor = Trainer(source, parallel, OptimConfig(), head="lm", total_steps=9, random_init=True, **common)
            critic = Trainer(source, parallel, OptimConfig(), head="value", total_steps=9, random_init=True, **common)
            reference = Model(source, parallel, head="lm", random_init=True, **common)
            offload = OffloadConfig(*[parks] * 4)
            owner = Offload(offload, trainers={"actor": actor, "critic": critic}, frozen={"reference": reference})
            shape = MicroBatchShape(tokens, tokens)
            [stage] = stage_activations(spec, parallel, shape, dtype="bfloat16")
            update = max(moment.total for moment in stage)
            moments = actor.moments_to_come() + critic.moments_to_come()
            vllm = owner.start_vllm(VLLM, sleeps=sleeps, update=update)  # type: ignore[type-var]
            turn("start")
        with rehearsal.tracing("steps"):
            for _ in range(2):
                if owner.vllm_sleeps or not sleeps:
                    owner.write_weights({})
                with owner.generating(lambda: owner.write_weights({})):
                    turn("generate")
                with owner.using("actor"):
                    actor.step([batch], language_model_loss(actor, aggregation="token"))
                    turn("update")
                owner.write_weights({})
                turn("written")
                with owner.using("actor", "critic"):
                    turn("save")
    after = 8 * sum(p.numel() for t in (actor, critic) for _, p in t._held_parameters())
    peaks = {phase: peak.nbytes / GIB for phase, peak in rehearsal.report().peaks.items()}
    plan = {name: getattr(vllm.plan, name) / GIB for name in ("weights", "work", "libraries", "cache", "free", "total")}
    grown = actor.moments_to_come(), critic.moments_to_come()
    return {"turns": turns, "peaks": peaks, "plan": plan, "moments": [moments, after], "left": grown}


def main() -> None:
    cases = {"parked": (True, True), "resident": (True, False), "always awake": (False, True)}
    results = {name: rehearse(sleeps=sleeps, parks=parks) for name, (sleeps, parks) in cases.items()}
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
