"""Under torchrun with 2 ranks: `mrlhf score` once for every case of CASES, in one process each.

usage: score_program.py WORLD_DIR VALUE_CHECKPOINT OUTPUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# name -> (data, checkpoint "lm" or "value", parallel keys, other keys)
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
UNPACKED = {"packing": False, "micro_batch_size": 5}
CASES: dict[str, tuple[str, str, dict[str, object], dict[str, object]]] = {
    "sft tp2+sp": ("sft", "lm", SP, {}),
    "sft pp2 unpacked": ("sft", "lm", PP, UNPACKED),
    "sft dp2": ("sft", "lm", {}, {}),
    "sft dp2 unpacked": ("sft", "lm", {}, UNPACKED),
    "sft tempered tp2": ("sft", "lm", TP, {"temperature": 0.5}),
    "prompts dp2 unpacked": ("prompts", "lm", {}, UNPACKED),
    "prompts tp2": ("prompts", "lm", TP, {}),
    "pref dp2 unpacked": ("pref", "lm", {}, UNPACKED),
    "pref tp2": ("pref", "lm", TP, {}),
    "value sft dp2": ("sft", "value", {}, {}),
    "value sft pp2 left": ("sft", "value", PP, {**UNPACKED, "padding_side": "left"}),
    "value pref tp2+sp unpacked": ("pref", "value", SP, UNPACKED),
    "value pref dp2": ("pref", "value", {}, {}),
    "sft cp2": ("sft", "lm", CP, {}),
    "value sft cp2 left": ("sft", "value", CP, {**UNPACKED, "padding_side": "left"}),
    "pref interleaved": ("pref", "lm", {**PP, "virtual_pipeline_model_parallel_size": 2}, {}),
}


def main() -> None:
    world, value, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    import torch.distributed as dist
    from groups import leave_layout

    from mrlhf.commands import score
    from mrlhf.config.options import ParallelConfig, ScoreStage
    from mrlhf.parallel import state

    state.shutdown = leave_layout  # the next case uses the same processes
    for name, (data, kind, parallel, options) in CASES.items():
        score.main(
            ScoreStage(
                checkpoint=str(world / "qwen2") if kind == "lm" else value,
                data=str(world / data),
                output=str(out / f"{name}.jsonl"),
                dtype="float32",
                parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
                **options,  # type: ignore[arg-type]
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
