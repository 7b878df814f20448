"""Under torchrun with two ranks: both convert models of the zoo in both directions; other layouts load the checkpoints.

usage: convert_ranks_program.py ZOO_DIR WORK_DIR KIND ...

Writes WORK/KIND.mrlhf and WORK/KIND.hf; rank 0 prints JSON. A KIND may be the path of another model, which is only
converted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ["MRLHF_DEVICE"] = "cpu"
    import torch
    import torch.distributed as dist
    from groups import leave_layout
    from zoo import VOCAB, samples

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.convert import hf
    from mrlhf.data.loader import Sample, collate
    from mrlhf.models import gpt
    from mrlhf.parallel import state
    from mrlhf.training.trainer import Model

    # isort: split
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    zoo, work, kinds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for kind in kinds:
        hf.hf_to_megatron(str(zoo / kind), work / f"{kind}.mrlhf")
        hf.megatron_to_hf(str(work / f"{kind}.mrlhf"), work / f"{kind}.hf")
    leave_layout()
    rows = [Sample(ids.numpy(), ids.numpy() * 0 + 1, i) for i, ids in enumerate(samples())]
    found: dict[str, float] = {}
    for layout in (ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(expert_model_parallel_size=2)):
        state.initialize(layout, seed=1)
        for kind in kinds:
            source = open_source(str(work / f"{kind}.mrlhf"))
            is_dense = source.spec.experts is None
            if (layout.expert_model_parallel_size > 1 and is_dense) or not (zoo / f"{kind}.pt").is_file():
                continue
            model = Model(source, layout, head="lm", dtype="float32", seed=1)
            batch = collate(rows, packing=True, pad_multiple=2)

            def logits(out_BTH: torch.Tensor, batch: object, model: Model = model) -> torch.Tensor:
                logits_BTV = gpt.lm_head(model.modules[-1], model.spec).logits(out_BTH)
                whole_BTV = gather_from_tensor_model_parallel_region(logits_BTV, model.collection.tp)
                return whole_BTV[..., :VOCAB].float().permute(2, 0, 1).contiguous()

            per_channel = [batch.split(x) for x in model.forward([batch], logits, channels=VOCAB)[0]]
            ours = [torch.stack(of_sample, -1) for of_sample in zip(*per_channel, strict=True)]
            errors = [float((a - b).abs().max()) for a, b in zip(ours, torch.load(zoo / f"{kind}.pt"), strict=True)]
            found[f"{kind} tp {layout.tensor_model_parallel_size} ep {layout.expert_model_parallel_size}"] = max(errors)
        leave_layout()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
