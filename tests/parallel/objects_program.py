"""Under torchrun on 2 ranks whose device's backend moves nothing: what ranks tell each other arrives all the same, over
gloo; prints JSON.
"""

from __future__ import annotations

import json

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from mrlhf.config.options import ParallelConfig
from mrlhf.parallel import device, state


def main() -> None:
    dist.Backend.register_backend(
        "nothing", lambda store, rank, size, timeout: FakeProcessGroup._create_internal(rank, size), devices=["cuda"]
    )
    here = device.Device("cuda", "nothing")
    device.current, device.take_gpu = lambda: here, lambda: None
    state.initialize(ParallelConfig(pipeline_model_parallel_size=2), seed=1)
    rank = dist.get_rank()
    result = {
        "last stage": state.from_last_stage({"loss": rank}, state.groups().collection.pp),
        "all": state.from_all_ranks([rank]),
        "any": [state.on_any_rank(rank == 1), state.on_any_rank(False)],
        "backends": {
            name: sorted({d.type for d in group._device_types})
            for name, group in vars(state.groups().collection).items()
            if isinstance(group, dist.ProcessGroup)
        },
    }
    state._groups = state.groups_for(ParallelConfig())
    result["data parallel"] = state.gather_from_data_parallel(rank)
    dist.barrier()
    if rank == 0:
        print(json.dumps(result))
    state.shutdown()


if __name__ == "__main__":
    main()
