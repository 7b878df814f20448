"""What one rank of 8 holds to save an 8B model, on fake CUDA tensors; prints JSON. With MRLHF_DEVICE=rehearsal.

usage: save_memory_program.py WORK_DIR RANK...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
WORLD = 8


def save_plan(hf: Path, rank: int) -> dict[str, Any]:
    from mrlhf.checkpoint.save import _plan_writes
    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import OptimConfig, ParallelConfig
    from mrlhf.models import gpt
    from mrlhf.parallel import state
    from mrlhf.parallel.rehearsal import Rehearsal
    from mrlhf.training.trainer import Trainer

    with Rehearsal(rank=rank, world=WORLD) as rehearsal:
        parallel = ParallelConfig()
        state.initialize(parallel, seed=1)
        gpt.fill = lambda *args, **kwargs: None  # what the weights are does not matter
        with rehearsal.tracing("build"):
            options = {"head": "lm", "dtype": "bfloat16", "seed": 1, "total_steps": 2, "random_init": True}
            trainer = Trainer(open_source(str(hf)), parallel, OptimConfig(), **options)
            for part in trainer.optimizer.chained_optimizers:
                part.init_state_fn(part.optimizer, part.config)
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in trainer.modules[0].parameters())}
        for phase in ("foreground", "background"):
            with rehearsal.tracing(phase) as meter:
                before = meter.live
                plan = _plan_writes(trainer.part(), {"step": 1}, copy=phase == "background")
                held = sum(s.data.nbytes for s in plan.shards if s.data.device.type == "cpu")
            report = rehearsal.report()
            found[phase] = {
                "written": plan.nbytes,
                "on the host": held,
                "largest": max(s.data.nbytes for s in plan.shards),
                "copied": report.copies.get((phase, "cuda->cpu"), 0),
                "device": report.peaks[phase].nbytes - before,
                "sent": sum(m.nbytes for m in report.messages if m.phase == phase),
            }
            del plan
        return found


def main() -> None:
    hf = Path(sys.argv[1])
    (hf / "config.json").write_text(json.dumps(LLAMA_8B))
    print("RESULT " + json.dumps({rank: save_plan(hf, int(rank)) for rank in sys.argv[2:]}))


if __name__ == "__main__":
    main()
