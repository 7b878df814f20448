"""Updates all weights of the generator: parameters that it uses unchanged, then those that it converts (packed or
quantised layers).

One exchange writes the first kind in place. The second kind comes in rounds: the plain weights of a few layers, this
rank's shard only, go into memory that lasts for the round, and the generator makes its own form of each. Making may be
collective within a replica (scales of a quantised weight that is sharded over ranks). So no rank starts it before all
its messages of the round are done, and all ranks take the layers in one order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch

from mrlhf.parallel.planner import Planner
from mrlhf.parallel.reshard import Reshard, StartMessages, Tensors

Make = Callable[[str, torch.Tensor], None]  # (parameter, its plain weight); the generator may keep the tensor


class WeightUpdate:
    """A rank's plans for one pair of layouts; `exchange` runs them, any number of times.

    made: the generator's parameters that are not written in place. bucket_bytes: limit for packing and unpacking, and
    the same again for the plain weights of a round. dtype: of messages and plain weights.
    """

    def __init__(self, planner: Planner, *, made: Collection[str], rank: int, dtype: torch.dtype, bucket_bytes: int,
                 start_messages: StartMessages | None = None) -> None:
        def make_plan(names: Collection[str]) -> Reshard:
            part = planner.restricted_to(names) if made else planner
            return Reshard(part, rank=rank, dtype=dtype, bucket_bytes=bucket_bytes, start_messages=start_messages)

        def plain_dtype(name: str) -> torch.dtype:
            return torch.float32 if planner.targets[rank][name][0].hf in planner.wide else dtype

        self.in_place = make_plan(set(planner.targets[rank]) - set(made))
        self.rounds = [(names, make_plan(names)) for names in planner.rounds(made, bucket_bytes // dtype.itemsize)]
        self._plain = {name: (planner.shape(name), plain_dtype(name)) for name in made}
        plans = [self.in_place, *(plan for _, plan in self.rounds)]
        self.sent, self.received = sum(plan.sent for plan in plans), sum(plan.received for plan in plans)
        self.copied = sum(plan.copied for plan in plans)

    @torch.no_grad()
    def exchange(self, source: Tensors, target: Tensors, make: Make | None = None) -> float:
        """Collective. Writes `target` in place, calls `make` for the other parameters; returns seconds."""
        start = time.perf_counter()
        self.in_place.exchange(source, target)
        device = next(iter((source or target).values())).device
        for names, plan in self.rounds:
            wanted = {name: self._plain[name] for name in names}
            plain = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in wanted.items()}
            plan.exchange(source, plain)
            for name in names:
                assert make is not None, "`made` names parameters, so the generator must make them"
                make(name, plain.pop(name))
        return time.perf_counter() - start
