"""What `mrlhf.parallel` changes in a process and what it leaves alone; prints JSON. Runs alone, before any other import
of Megatron.
"""

from __future__ import annotations

import json
import sys


def raises(call) -> str:
    try:
        call()
    except Exception as error:  # any kind: its name is the result
        return type(error).__name__
    return ""


def main() -> None:
    import torch

    stock = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor", "compile", "autocast")}
    real_cuda = torch.cuda
    stock_error = raises(lambda: torch.zeros(1).cuda())

    import mrlhf.parallel  # noqa: F401
    from mrlhf.parallel import device

    # isort: split
    import megatron.core.parallel_state
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.dist_checkpointing import mapping
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    inside = {"__name__": "megatron.core.anything", "torch": torch}
    facade = megatron.core.parallel_state.torch
    result = {
        "device": [device.current().name, device.current().backend],
        "cuda_available": torch.cuda.is_available(),
        "stock_kept": torch.cuda is real_cuda and all(getattr(torch, name) is value for name, value in stock.items()),
        "error_before": stock_error,
        "error_after": raises(lambda: torch.zeros(1).cuda()),
        "error_zeros": raises(lambda: torch.zeros(1, device="cuda")),
        "type_outside": torch.zeros(1).type(),
        "type_inside": eval("torch.zeros(1).type()", inside),
        "cuda_inside": eval("str(torch.zeros(1).cuda().device)", inside),
        "facade": facade is not torch
        and str(facade.zeros(1, device="cuda").device) == "cpu"
        and facade.float32 is torch.float32,
        "facade_is_stock_class": isinstance(facade.zeros(1), torch.Tensor) and facade.Tensor is torch.Tensor,
        "rng": megatron_random._get_cuda_rng_state().equal(torch.get_rng_state()),
        "init_data": mapping.ShardedTensor.init_data.__name__,
        "queue": type(filesystem_async._results_queue).__module__,
        "torch_in_sys_modules": sys.modules["torch"] is torch,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
