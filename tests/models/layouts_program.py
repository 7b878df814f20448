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

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.data.loader import Sample, collate
    from mrlhf.models import gpt
    from mrlhf.models.layers.logprobs import Head, head_logprobs
    from mrlhf.parallel import state
    from mrlhf.training.trainer import Model

    # isort: split
    from groups import leave_layout
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

        def fn(out_BTX, batch):
            whole = out_BTX
            if model.head == "lm":
                logits = gpt.lm_head(model.modules[-1], model.spec).logits(out_BTX)
                whole = gather_from_tensor_model_parallel_region(logits, model.collection.tp)
            return whole[..., :channels].float().permute(2, 0, 1).contiguous()

        batch = collate(rows, packing=packing, pad_multiple=model.collection.tp.size())
        per_channel = [batch.split(x) for x in model.forward([batch], fn, channels=channels)[0]]
        return [torch.stack(of_sample, -1) for of_sample in zip(*per_channel)]

    def logprobs_error() -> dict[str, float]:
        """Against torch on all logits: values, entropy, gradients of hidden states and head; also with a softcap."""
        group, generator = model.collection.tp, torch.Generator().manual_seed(0)
        real, padded, tp, rank = 150, 256, group.size(), group.rank()
        hidden, weight = torch.randn(3, 9, 8, generator=generator), torch.randn(padded, 8, generator=generator)
        targets = torch.randint(0, real, (3, 9), generator=generator)
        weights = torch.randn(2, 3, 9, generator=generator)
        mine = slice(rank * padded // tp, (rank + 1) * padded // tp)
        part, ours = weight[mine].clone().requires_grad_(), hidden.clone().requires_grad_()
        head = Head(part, real, group, scale=0.5, softcap=4.0)
        logps, entropy, is_top, log_z = head_logprobs(ours, targets, head, temperature=0.7, with_entropy=True)
        (logps * weights[0] + entropy * weights[1] + 0.1 * log_z.square()).sum().backward()
        theirs, whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = 4.0 * torch.tanh(0.5 * (theirs @ whole[:real].T) / 4.0) / 0.7
        wanted, wanted_log_z = torch.log_softmax(logits, -1), torch.logsumexp(logits, -1)
        wanted_logps, wanted_entropy = wanted.gather(-1, targets[..., None])[..., 0], -(wanted.exp() * wanted).sum(-1)
        (wanted_logps * weights[0] + wanted_entropy * weights[1] + 0.1 * wanted_log_z.square()).sum().backward()
        errors = torch.stack(
            [
                (logps - wanted_logps).abs().max(),
                (entropy - wanted_entropy).abs().max(),
                torch.maximum((ours.grad - theirs.grad).abs().max(), (part.grad - whole.grad[mine]).abs().max()),
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
                got = outputs(model, packing=packing, channels=VOCAB)
                errors += [float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)]
            found[kind] = max(errors)
        if parallel.expert_model_parallel_size > 1:
            source = open_source(str(zoo / "mixtral"))
            model = Model(source, parallel, head="lm", dtype="float32", seed=3, random_init=True)
            found["random"] = outputs(model, packing=True, channels=VOCAB)[0][-1, :20].tolist()
            results[name] = found
            leave_layout()
            continue
        model = Model(open_source(str(zoo / "qwen2_tied")), parallel, head="value", dtype="float32", seed=3)
        found["values"] = torch.cat(outputs(model, packing=True, channels=1)).flatten().tolist()
        model = Model(open_source(str(zoo / "llama")), parallel, head="lm", dtype="float32", seed=3, random_init=True)
        found["random"] = outputs(model, packing=True, channels=VOCAB)[0][-1, :20].tolist()
        model = Model(open_source(str(zoo / "llama")), parallel, head="lm", dtype="bfloat16", seed=3)
        found["bfloat16"] = max(
            float((a - b).abs().max())
            for a, b in zip(outputs(model, packing=True, channels=VOCAB), torch.load(zoo / "llama.pt"))
        )
        found["logprobs"] = logprobs_error()
        if name == "1":
            source = open_source(str(zoo / "mixtral"))
            model = Model(source, parallel, head="lm", dtype="float32", seed=3, random_init=True)
            found["random experts"] = outputs(model, packing=True, channels=VOCAB)[0][-1, :20].tolist()
        results[name] = found
        leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
