"""Every model of the zoo there and back in one process; prints JSON. usage: convert_program.py ZOO_DIR WORK_DIR

ZOO/KIND (any dtype) -> WORK/KIND.mrlhf -> WORK/KIND.hf, with the verification's figures of both ways.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ["MRLHF_DEVICE"] = "cpu"
    zoo, work = Path(sys.argv[1]), Path(sys.argv[2])
    import torch

    from mrlhf import convert
    from mrlhf.checkpoint import Part, open_source, save
    from mrlhf.config import ParallelConfig
    from mrlhf.engine import Model
    from mrlhf.errors import MrlhfError
    from mrlhf.parallel import state
    from mrlhf.verify import verify

    result: dict[str, object] = {}
    for kind in sorted(p.name for p in zoo.iterdir() if p.is_dir()):
        made = convert.hf_to_megatron(str(zoo / kind), work / f"{kind}.mrlhf")
        convert.megatron_to_hf(str(made.path), work / f"{kind}.hf")
        result[kind] = [
            made.manifest["dtype"],
            made.head,
            verify(made, str(zoo / kind)).max_abs,
            verify(made, str(work / f"{kind}.hf")).max_abs,
        ]

    # a reward model: fresh head on an LM, statistics as rm.py writes them, out to transformers and in again
    value = convert.hf_to_megatron(str(zoo / "qwen2"), work / "value.mrlhf", head="value", seed=7)
    result["value beside its LM"] = verify(value, str(zoo / "qwen2")).max_abs
    model = Model(value, ParallelConfig(), head="value", dtype="float32", seed=1)
    part = Part("", model.modules, None, "value", value.hf_dir)
    save(work / "rm.mrlhf", [part], stage="rm", step=3, dtype="float32", extra={"reward_mean": 1.5, "reward_std": 0.5}, keep_last=None)
    export = convert.megatron_to_hf(str(work / "rm.mrlhf"), work / "rm.hf")
    result["value notes"] = export.notes
    result["value"] = verify(export.source, str(export.path)).max_abs
    back = convert.hf_to_megatron(str(work / "rm.hf"), work / "rm2.mrlhf")
    convert.megatron_to_hf(str(back.path), work / "rm2.hf")
    result["value head"] = [back.head, verify(back, str(work / "rm2.hf")).max_abs]

    # a run's directory with a critic beside the actor, as ppo.py saves it
    actor = Model(open_source(str(zoo / "qwen2")), ParallelConfig(), head="lm", dtype="bfloat16", seed=1)
    parts = [Part("", actor.modules, None, "lm", zoo / "qwen2"), Part("critic", model.modules, None, "value", value.hf_dir)]
    save(work / "run/checkpoints/step_5", parts, stage="ppo", step=5, dtype="float32", extra={}, keep_last=1)
    save(work / "half.mrlhf", parts[:1], stage="sft", step=5, dtype="bfloat16", extra={})
    convert.megatron_to_hf(str(work / "run"), work / "actor.hf")
    convert.megatron_to_hf(str(work / "run"), work / "critic.hf", part="critic")
    convert.megatron_to_hf(str(work / "half.mrlhf"), work / "half.hf")

    for dtype in ("float16", "bfloat16", "float32"):
        made_hf = convert.megatron_to_hf(str(work / "qwen2.mrlhf"), work / f"{dtype}.hf", dtype=dtype)
        result[f"as {dtype}"] = verify(made_hf.source, str(made_hf.path)).max_abs
    narrow = convert.hf_to_megatron(str(zoo / "qwen2"), work / "narrow.mrlhf", dtype="bfloat16")
    result["narrow"] = [narrow.manifest["dtype"], verify(narrow, str(zoo / "qwen2")).max_abs]

    # a wrong mapping must show: rows of two heads swapped in the exported file
    from safetensors.torch import load_file, save_file

    wrong = work / "float32.hf" / "model.safetensors"
    tensors = load_file(wrong)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    q[:64] = q[:64].roll(32, 0).clone()
    save_file(tensors, wrong, metadata={"format": "pt"})
    result["swapped heads"] = verify(open_source(str(work / "qwen2.mrlhf")), str(work / "float32.hf")).ok

    def refusal(call) -> str:
        try:
            call()
        except MrlhfError as error:
            return f"{type(error).__name__}: {error.what}"
        return ""

    with torch.no_grad():
        actor.modules[0].decoder.final_layernorm.weight[0] = 1e5
    save(work / "large.mrlhf", parts[:1], stage="sft", step=5, dtype="bfloat16", extra={})
    result["refused"] = {
        "overflow": refusal(lambda: convert.megatron_to_hf(str(work / "large.mrlhf"), work / "large.hf", dtype="float16")),
        "existing": refusal(lambda: convert.hf_to_megatron(str(zoo / "qwen2"), work / "qwen2.mrlhf")),
        "existing hf": refusal(lambda: convert.megatron_to_hf(str(work / "qwen2.mrlhf"), work / "qwen2.hf")),
        "checkpoint as hf": refusal(lambda: convert.hf_to_megatron(str(work / "qwen2.mrlhf"), work / "x")),
        "hf as checkpoint": refusal(lambda: convert.megatron_to_hf(str(zoo / "qwen2"), work / "x")),
        "no critic": refusal(lambda: convert.megatron_to_hf(str(work / "qwen2.mrlhf"), work / "x", part="critic")),
        "value as lm": refusal(lambda: convert.hf_to_megatron(str(work / "rm.hf"), work / "x", head="lm")),
        "other model": refusal(lambda: verify(open_source(str(work / "qwen2.mrlhf")), str(zoo / "qwen3"))),
    }
    result["nothing left"] = sorted(p.name for p in work.iterdir() if p.name == "x" or p.name.endswith(".tmp") or p.name == "large.hf")
    print("RESULT " + json.dumps(result))
    state.shutdown()


if __name__ == "__main__":
    main()
