"""vLLM loads HF directories, one after the other in one process; prints JSON.

usage: families_program.py DIRECTORY ...

For each: greedy answers of vLLM and of transformers, and the vLLM parameters that differ from what the family's map
says of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lose_in_sleep(model: Any) -> int:
    """Overwrites what sleep level 2 drops: the weights, and tensors that a module holds besides its buffers.

    The cache has a tag of its own, and the scales named _cpu stay on the host on a GPU too.
    """
    import torch

    kept = {b.untyped_storage().data_ptr() for b in model.buffers()}
    attributes = [
        x
        for module in model.modules()
        for name, x in vars(module).items()
        if isinstance(x, torch.Tensor) and name != "kv_cache" and not name.endswith("_cpu")
    ]
    lost = [x for x in (*model.parameters(), *attributes) if x.untyped_storage().data_ptr() not in kept]
    for x in lost:
        x.data.fill_(float("nan") if x.is_floating_point() else 0)
    return len(lost)


def spoilt(weights: Any, first: Any, write: Callable[[], None]) -> list[str]:
    """What finish_write says where a linear layer, and the experts, compute from weights in another order."""
    import torch

    from mrlhf.errors import EnvironmentProblem
    from mrlhf.rl.rollout import vllm_weights
    from mrlhf.rl.rollout.vllm_first_write import FirstWrite

    said, pack = [], vllm_weights._pack_experts
    layer = next(iter(first.layers.values()))

    def reordered(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.flip(0), bias)

    for of_experts in (False, True):
        own = layer.cpu_linear
        if of_experts:
            vllm_weights._pack_experts = lambda layer: None
        else:
            layer.cpu_linear = reordered
        write()
        weights.first = FirstWrite(first.layers, first.spec, first.config)
        weights.first.rows = first.rows
        try:
            weights.finish_write()
        except EnvironmentProblem as error:
            said.append(str(error))
        layer.cpu_linear, vllm_weights._pack_experts = own, pack
    return said


def main() -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_MLA_DISABLE="1",
        MRLHF_DEVICE="cpu",
    )
    import torch
    import vllm
    import vllm.distributed.parallel_state as groups
    from transformers import AutoModelForCausalLM

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.models.families import vllm_map
    from mrlhf.models.hf_files import HFReader
    from mrlhf.parallel import state
    from mrlhf.rl.rollout.vllm_weights import VLLMWeights, keep_linear_weights

    state.initialize(ParallelConfig(), seed=1)
    keep_linear_weights()
    prompts = [
        [5, 17, 101, 33],
        [2, 9, 250],
        [77, 3, 91, 64, 12, 8, 150, 31, 6, 200, 40, 11],
    ]  # the last is longer than the windows

    def greedy(model, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    directories, wanted = [Path(d) for d in sys.argv[1:]], {}
    for directory in directories:  # before vLLM, which changes transformers' classes where it has no model of its own
        theirs = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            wanted[directory] = [greedy(theirs, p, 10) for p in prompts]
    results: dict[str, object] = {}
    for directory in directories:
        source = open_source(str(directory))
        llm = vllm.LLM(
            str(directory),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            distributed_executor_backend="external_launcher",
            kv_cache_memory_bytes=64 << 20,
            max_num_seqs=8,
            enforce_eager=True,
            disable_log_stats=True,
            seed=1,
        )
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=10, detokenize=False, ignore_eos=True)
        reader, expected = HFReader(directory, source.spec, head="lm"), vllm_map(source.spec, tp=1, rank=0)
        weights = VLLMWeights(llm, source.spec)
        assert weights.misfits(expected) == []
        found = weights.parameters
        wrong = sorted(set(found) ^ set(expected))
        # experts are packed on CPU: what is written into them is compared by the answers of tests/rl/test_ppo.py
        wrong += [
            name
            for name in expected
            if name in found
            and not name.endswith(("w13_weight", "w2_weight"))
            and not all(
                torch.equal(found[name].narrow(b.dim, b.offset, b.length), reader.read(b)) for b in expected[name]
            )
        ]

        def write() -> None:
            for name, blocks in expected.items():  # noqa: B023
                for b in blocks:
                    found[name].narrow(b.dim, b.offset, b.length).copy_(reader.read(b))  # noqa: B023

        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert lose_in_sleep(runner.get_model()) >= len(found) / 2  # experts are views of one tensor
        write()
        first = weights.first
        weights.finish_write()  # raises where vLLM computes from something else
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        results[directory.name] = {
            "spoilt": spoilt(weights, first, write),
            "vllm": [list(o.outputs[0].token_ids) for o in outputs],
            "hf": wanted[directory],
            "wrong": wrong,
        }
        llm.llm_engine.engine_core.shutdown()
        groups.destroy_model_parallel()
        groups._WORLD = None
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
