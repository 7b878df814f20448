"""Leaving a layout for the next one in the same processes: the programs that tests start under torchrun share this."""

from __future__ import annotations


def leave_layout() -> None:
    """Megatron forgets its groups but leaves them open, and every gloo group keeps threads: after some layouts there are thousands."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
