"""`mrlhf doctor`: versions, the device of a run here with its driver, and what would stop one."""

from __future__ import annotations

import os

from mrlhf.observe.redaction import redact
from mrlhf.observe.tracker import collect_env

_VARIABLES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "NCCL_", "MRLHF_", "VLLM_", "PYTORCH_")


def main() -> int:
    """Exit status 0, or a raised EnvironmentProblem (2)."""
    print("versions  " + ", ".join(f"{name} {version}" for name, version in collect_env()["versions"].items()))
    variables = redact({name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)})
    print("variables " + (" ".join(f"{name}={value}" for name, value in variables.items()) or "none about the device"))
    import torch

    from mrlhf.parallel import device
    from mrlhf.parallel.peak_rates import gpu_name, peak_tflops

    here = device.current()
    print(f"device    {here.summary()}")
    if here.is_cuda:
        device.take_gpu()
        free, size = (x / 2**30 for x in torch.cuda.mem_get_info())
        major, minor = torch.cuda.get_device_capability()
        print(f"GPU       {gpu_name()}, 1 of {torch.cuda.device_count()}: compute capability {major}.{minor}, "
              f"{free:.1f} of {size:.1f} GiB free, driver {device.driver_version()}")
        rate = peak_tflops("bfloat16")
        print(f"peak      {f'{rate:,.0f} TFLOP/s in bfloat16' if rate else 'not known: runs log no perf/mfu'}")
    print("nothing wrong was found")
    return 0
