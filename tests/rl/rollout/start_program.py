"""vLLM's own reading of what it is started with on CUDA; prints JSON. It needs no GPU: the card is a snapshot.

usage: start_program.py HF_DIRECTORY
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from types import SimpleNamespace

    from vllm import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, map_unquantized_backend
    from vllm.v1.worker.utils import request_memory

    from mrlhf.memory.vllm_budget import plan_vllm
    from mrlhf.models.families.spec import Layer, ModelSpec
    from mrlhf.parallel import device
    from mrlhf.rl.rollout import vllm_engine

    gib = 2**30
    spec = ModelSpec("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5, False, (Layer(),) * 32)
    sizes = {"max_model_len": 4096, "max_num_seqs": 256}
    vllm_engine.device.current = lambda: device.Device("cuda", "nccl")
    starts, options = {}, {}
    for held in (4, 8, 18, 44):  # GiB of the trainer on the card
        free = (79 - held) * gib
        memory = plan_vllm(
            spec, dtype="bfloat16", tp=1, kv_cache_mib=None, free=free, room=free, total=79 * gib, **sizes
        )
        options = vllm_engine.device_options(memory, **sizes)
        # vLLM looks after its libraries have taken their part
        snapshot = SimpleNamespace(total_memory=79 * gib, free_memory=free - memory.libraries, device_="cuda:0")
        share = SimpleNamespace(gpu_memory_utilization=options["gpu_memory_utilization"])
        starts[held] = request_memory(snapshot, share) / gib, memory.cache / gib
    args = EngineArgs(sys.argv[1], **sizes, **options, skip_tokenizer_init=True, enable_sleep_mode=True,
                      kv_cache_memory_bytes=1 << 30)  # fmt: skip
    result = {
        "starts": starts,
        "default": EngineArgs(sys.argv[1]).gpu_memory_utilization,
        "backend": map_unquantized_backend(args.moe_backend) is UnquantizedMoeBackend.TRITON,
        "largest batch": args.max_num_batched_tokens,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
