"""Leaving a layout for the next one in the same processes: the programs that tests start under torchrun share this."""

from __future__ import annotations


def leave_layout() -> None:
    """Groups stay open until they are destroyed, and every gloo group keeps threads:
    after some layouts there are thousands.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
