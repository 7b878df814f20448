"""Under torchrun, or alone: every model of the zoo under every layout of this world; rank 0 prints JSON.

usage: layouts_program.py ZOO_DIR LAYOUT ...     (a layout: tp2, tp2+sp, pp2, tp2xep2, ep2, 1)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch
    import torch.distributed as dist
    from zoo import KINDS, MOE, VOCAB, samples

    from mrlhf.checkpoint import open_source
    from mrlhf.config import ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.engine import Model
    from mrlhf.parallel import state
    from mrlhf.parallel.logprobs import vocab_parallel_logprobs

    # isort: split
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    zoo = Path(sys.argv[1])
    layouts = {
        "1": ParallelConfig(),
        "tp2": ParallelConfig(tensor_model_parallel_size=2),
        "tp2+sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "pp2": ParallelConfig(pipeline_model_parallel_size=2),
        "ep2": ParallelConfig(expert_model_parallel_size=2),
        "tp2xep2": ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True),
    }
    rows = [Sample(ids.numpy(), ids.numpy() * 0 + 1, i) for i, ids in enumerate(samples())]

    def outputs(model: Model, *, packing: bool, channels: int) -> list[torch.Tensor]:
        """[T, channels] of every sample."""

        def fn(out_BTW, batch):
            whole = gather_from_tensor_model_parallel_region(out_BTW) if model.head == "lm" else out_BTW
            return whole[..., :channels].float().permute(2, 0, 1).contiguous()

        batch = collate(rows, packing=packing, pad_multiple=parallel_state.get_tensor_model_parallel_world_size())
        per_channel = [batch.split(x) for x in model.forward([batch], fn, channels=channels)[0]]
        return [torch.stack(of_sample, -1) for of_sample in zip(*per_channel)]

    def logprobs_error() -> dict[str, float]:
        """Against torch on the whole logits: values, entropy and the gradient of this rank's part."""
        group, generator = parallel_state.get_tensor_model_parallel_group(), torch.Generator().manual_seed(0)
        real, padded, tp, rank = 150, 256, group.size(), group.rank()
        logits, targets = torch.randn(3, 9, padded, generator=generator) * 3, torch.randint(0, real, (3, 9), generator=generator)
        weights = torch.randn(2, 3, 9, generator=generator)
        ours = logits[..., rank * padded // tp : (rank + 1) * padded // tp].clone().requires_grad_()
        logps, entropy, is_top = vocab_parallel_logprobs(ours, targets, vocab_size=real, group=group, temperature=0.7, with_entropy=True)
        (logps * weights[0] + entropy * weights[1]).sum().backward()
        theirs = logits.clone().requires_grad_()
        wanted = torch.log_softmax(theirs[..., :real] / 0.7, -1)
        wanted_logps, wanted_entropy = wanted.gather(-1, targets[..., None])[..., 0], -(wanted.exp() * wanted).sum(-1)
        (wanted_logps * weights[0] + wanted_entropy * weights[1]).sum().backward()
        part = theirs.grad[..., rank * padded // tp : (rank + 1) * padded // tp]
        errors = torch.stack(
            [
                (logps - wanted_logps).abs().max(),
                (entropy - wanted_entropy).abs().max(),
                (ours.grad - part).abs().max(),
                (is_top != (wanted.argmax(-1) == targets)).sum().float(),
            ]
        ).detach()
        dist.all_reduce(errors, op=dist.ReduceOp.MAX)
        return dict(zip(("logps", "entropy", "grad", "is_top"), errors.tolist()))

    results: dict[str, object] = {}
    for name in sys.argv[2:]:
        parallel = layouts[name]
        state.initialize(parallel, seed=1)
        found: dict[str, object] = {}
        for kind in MOE if parallel.expert_model_parallel_size > 1 else KINDS:
            model = Model(open_source(str(zoo / kind)), parallel, head="lm", dtype="float32", seed=1)
            wanted = torch.load(zoo / f"{kind}.pt")
            errors = []
            for packing in (True, False):
                errors += [float((a - b).abs().max()) for a, b in zip(outputs(model, packing=packing, channels=VOCAB), wanted, strict=True)]
            found[kind] = max(errors)
        if parallel.expert_model_parallel_size > 1:
            model = Model(open_source(str(zoo / "mixtral")), parallel, head="lm", dtype="float32", seed=3, random_init=True)
            found["random"] = outputs(model, packing=True, channels=VOCAB)[0][-1, :20].tolist()
            results[name] = found
            parallel_state.destroy_model_parallel()
            continue
        model = Model(open_source(str(zoo / "qwen2_tied")), parallel, head="value", dtype="float32", seed=3)
        found["values"] = torch.cat(outputs(model, packing=True, channels=1)).flatten().tolist()
        model = Model(open_source(str(zoo / "llama")), parallel, head="lm", dtype="float32", seed=3, random_init=True)
        found["random"] = outputs(model, packing=True, channels=VOCAB)[0][-1, :20].tolist()
        model = Model(open_source(str(zoo / "llama")), parallel, head="lm", dtype="bfloat16", seed=3)
        found["bfloat16"] = max(
            float((a - b).abs().max()) for a, b in zip(outputs(model, packing=True, channels=VOCAB), torch.load(zoo / "llama.pt"))
        )
        found["logprobs"] = logprobs_error()
        if name == "1":
            model = Model(open_source(str(zoo / "mixtral")), parallel, head="lm", dtype="float32", seed=3, random_init=True)
            found["random experts"] = outputs(model, packing=True, channels=VOCAB)[0][-1, :20].tolist()
        results[name] = found
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
