"""Under torchrun or alone: seconds of an all-reduce of several sizes, `RESULT BYTES SECONDS` a line; and its sum."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]


def main() -> None:
    os.environ["MRLHF_DEVICE"] = "cuda"
    import torch
    import torch.distributed as dist

    from first_hour.machine import seconds_of
    from mrlhf.config.options import ParallelConfig
    from mrlhf.parallel import state

    state.initialize(ParallelConfig(), seed=1)
    ones = torch.ones(1024, device="cuda")
    dist.all_reduce(ones)
    assert bool((ones == dist.get_world_size()).all()), "a wrong sum"
    for mib in (1, 32, 512):
        x = torch.zeros(mib << 20, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
        seconds = seconds_of(lambda x=x: dist.all_reduce(x))
        if dist.get_rank() == 0:
            print(f"RESULT {mib << 20} {seconds:.6g}", flush=True)
    state.shutdown()


if __name__ == "__main__":
    main()
