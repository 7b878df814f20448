"""Under torchrun on 2 ranks (trainer PP 2, vLLM TP 2): weights of two HF directories into a live vLLM of fp8 layers,
one after the other, against a fresh vLLM that loads the second; writes JSON.

usage: weights_program.py OUTPUT.json DIRECTORY_A DIRECTORY_B
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BUCKET = 128 << 10


def sampler_differences(own: object, logprobs: object) -> int:
    """Steps of 150 in which our sampler's tokens, log-probs or random numbers are not those of vLLM's `own`,
    `logprobs`.
    """
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler

    sampler, found = TopKTopPSampler("processed_logprobs"), 0
    seeded = [{i: torch.Generator().manual_seed(i) for i in (0, 2, 3)} for _ in range(2)]  # request 1 has no seed
    for step in range(150):
        logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(step))
        k, p = (torch.tensor([50, 9, 5, 50]), torch.tensor([1.0, 0.9, 0.8, 0.5])) if step % 2 else (None, None)
        results = []
        for forward, gather, generators in zip(
            (own, TopKTopPSampler.forward_cpu), (logprobs, Sampler.gather_logprobs), seeded, strict=True
        ):
            torch.manual_seed(step)
            tokens, logps = forward(sampler, logits.clone(), generators, k, p)
            results.append((tokens, logps, *gather(logps, 0, tokens.long())[:2]))
            if step == 99:  # the batch is put in another order
                generators[1] = generators.pop(3)
        found += not all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return found


def main() -> None:
    import torch
    import torch.distributed as dist
    import vllm
    import vllm.distributed.parallel_state as groups
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.models.reshard_plan import make_weight_update
    from mrlhf.parallel import state
    from mrlhf.rl.rollout.vllm_engine import Sampling, VLLMEngine
    from mrlhf.training.trainer import Model

    own_sampler = TopKTopPSampler.forward_cpu, Sampler.gather_logprobs
    output, *directories = (Path(a) for a in sys.argv[1:])
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    layout = state.initialize(parallel, seed=1)
    rank = dist.get_rank()
    sources = [open_source(str(d)) for d in directories]
    models = [Model(source, parallel, head="lm", dtype="bfloat16", seed=1) for source in sources]
    engine = VLLMEngine(
        sources[0].spec,
        sources[0].hf_dir,
        dtype="bfloat16",
        tp=2,
        max_model_len=128,
        kv_cache_mib=64,
        max_num_seqs=8,
        seed=1,
        weights="fp8",
    )
    prompts = [[5, 17, 101, 33], [2, 9, 250], [77, 3, 91, 64, 12, 8, 150, 31, 6, 200, 40, 11]]
    greedy = Sampling(0.0, 1.0, -1, 16, ())

    def answers() -> list[list[object]]:
        return [[a.tokens, a.logps] for a in engine.generate(prompts, [1] * len(prompts), greedy)]

    def addresses() -> list[int]:
        return [
            p.data_ptr()
            for p in engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().parameters()
        ]

    update = make_weight_update(
        sources[0].spec,
        layout,
        rollout_tp=2,
        rank=rank,
        dtype=torch.bfloat16,
        made=engine.weights.made,
        bucket_bytes=BUCKET,
        node=2,
    )
    before, found, most = addresses(), [], [0]

    def make(name: str, weight: torch.Tensor) -> None:
        most[0] = max(most[0], weight.untyped_storage().nbytes())
        engine.weights.convert(name, weight)

    for model in models:
        update.exchange(model.parameters(), engine.weights.parameters, make)
        engine.weights_changed()
        found.append(answers())
    result = {
        "answers": found,
        "moved": before != addresses(),
        "rounds": len(update.rounds),
        "made": len(engine.weights.made),
        "bucket": BUCKET,
        "largest": most[0],
        "received": update.received,
    }
    engine.shutdown()
    result["sampler_differences"] = sampler_differences(*own_sampler)
    groups.destroy_model_parallel()
    groups._WORLD = None
    fresh = vllm.LLM(
        str(directories[1]),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        quantization="fp8_per_channel",
        max_model_len=128,
        tensor_parallel_size=2,
        distributed_executor_backend="external_launcher",
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=8,
        logprobs_mode="processed_logprobs",
        enforce_eager=True,
        enable_chunked_prefill=False,
        disable_log_stats=True,
        seed=1,
    )
    engine.llm = fresh
    result["fresh"] = answers()
    if rank == 0:
        output.write_text(json.dumps(result))
    engine.shutdown()
    state.shutdown()


if __name__ == "__main__":
    main()
