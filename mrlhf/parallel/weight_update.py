"""All of the generator's weights: the parameters that it reads as they are, then those of which it makes a form of its own.

The first are written in place by one exchange. The others (packed or quantised layers) come in rounds: the plain weights of a
few layers, only this rank's shard of them, into memory that lasts for the round, and the generator makes its form of each.
Making may be collective within a replica (scales of a quantised weight that is cut over the ranks), so no rank begins
before all its messages of the round are done, and all go through the layers in one order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping

import torch

from mrlhf.parallel.reshard import Planner, Reshard, StartMessages

Make = Callable[[str, torch.Tensor], None]  # (parameter, its plain weight), which the generator may keep


class WeightUpdate:
    """The plans of one pair of layouts, and their execution as often as wanted.

    made: the generator's parameters that are not written in place. bucket_bytes: memory for packing and unpacking, and for the plain weights
    of a round, each. dtype: of the messages and plain weights.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        made: Collection[str],
        rank: int,
        dtype: torch.dtype,
        bucket_bytes: int,
        start_messages: StartMessages | None = None,
    ) -> None:
        def plan(names: Collection[str]) -> Reshard:
            part = planner.only(names) if made else planner
            return Reshard(part, rank=rank, dtype=dtype, bucket_bytes=bucket_bytes, start_messages=start_messages)

        self.dtype = dtype
        self.in_place = plan(set(planner.targets[rank]) - set(made))
        self.rounds = [(names, plan(names)) for names in planner.rounds(made, bucket_bytes // dtype.itemsize)]
        self._plain = {
            name: (planner.shape(name), torch.float32 if planner.targets[rank][name][0].hf in planner.wide else dtype) for name in made
        }
        plans = [self.in_place, *(plan for _, plan in self.rounds)]
        self.sent, self.received, self.copied = (sum(getattr(p, what) for p in plans) for what in ("sent", "received", "copied"))
        self.most_plain_bytes = max((sum(self.plain_bytes(n) for n in names) for names, _ in self.rounds), default=0)

    def plain_bytes(self, name: str) -> int:
        shape, dtype = self._plain[name]
        return math.prod(shape) * dtype.itemsize

    @torch.no_grad()
    def exchange(self, source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], make: Make | None = None) -> float:
        """Writes `target`'s parameters in place and calls `make` for the others; collective. Returns the seconds it took."""
        start = time.perf_counter()
        self.in_place.exchange(source, target)
        device = next(iter((source or target).values())).device
        for names, plan in self.rounds:
            plain = {name: torch.empty(self._plain[name][0], dtype=self._plain[name][1], device=device) for name in names}
            plan.exchange(source, plain)
            for name in names:
                assert make is not None, "a generator with such weights has a way to make them"
                make(name, plain.pop(name))
        return time.perf_counter() - start
