"""Every model of the zoo there and back in one process; prints JSON. usage: convert_program.py ZOO_DIR WORK_DIR

ZOO/KIND (any dtype) -> WORK/KIND.mrlhf -> WORK/KIND.hf, with the verification's figures; every family in bf16 too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    os.environ["MRLHF_DEVICE"] = "cpu"
    zoo, work = Path(sys.argv[1]), Path(sys.argv[2])
    import torch
    from zoo import KINDS

    from mrlhf.checkpoint.save import Part, save
    from mrlhf.checkpoint.source import open_source
    from mrlhf.checkpoint.tensor_file import Skeleton
    from mrlhf.config.options import ParallelConfig
    from mrlhf.convert import hf
    from mrlhf.convert.verify import compare_models
    from mrlhf.errors import MrlhfError
    from mrlhf.models import gpt
    from mrlhf.models.families import hf_tensors
    from mrlhf.parallel import state
    from mrlhf.training.trainer import Model

    # isort: split
    from megatron.core import dist_checkpointing

    result: dict[str, object] = {}
    for kind in sorted(p.name for p in zoo.iterdir() if p.is_dir()):
        made = hf.hf_to_megatron(str(zoo / kind), work / f"{kind}.mrlhf")
        hf.megatron_to_hf(str(made.path), work / f"{kind}.hf")
        result[kind] = [made.manifest["dtype"], made.head, compare_models(made, str(zoo / kind)).max_abs]
        if made.manifest["dtype"] == "float32" and kind in KINDS:
            for source, name in ((zoo / kind, f"{kind}.bf16.hf"), (work / f"{kind}.bf16.hf", f"{kind}.bf16.again")):
                half = hf.hf_to_megatron(str(source), work / (name + ".mrlhf"), dtype="bfloat16")
                hf.megatron_to_hf(str(half.path), work / name)

    # a reward model: fresh head on an LM, statistics as rm.py writes them, out to transformers and in again
    value = hf.hf_to_megatron(str(zoo / "qwen2"), work / "value.mrlhf", head="value", seed=7)
    result["value beside its LM"] = compare_models(value, str(zoo / "qwen2")).max_abs
    model = Model(value, ParallelConfig(), head="value", dtype="float32", seed=1)
    part = Part("", model.modules, None, "value", value.hf_dir)
    statistics = {"reward_mean": 1.5, "reward_std": 0.5}
    save(work / "rm.mrlhf", [part], {"stage": "rm", "step": 3, "dtype": "float32", **statistics})
    export = hf.megatron_to_hf(str(work / "rm.mrlhf"), work / "rm.hf")
    result["value notes"] = export.notes
    result["value"] = compare_models(export.source, str(export.path)).max_abs
    back = hf.hf_to_megatron(str(work / "rm.hf"), work / "rm2.mrlhf")
    hf.megatron_to_hf(str(back.path), work / "rm2.hf")
    result["value head"] = [back.head, compare_models(back, str(work / "rm2.hf")).max_abs]

    # a run's directory with a critic beside the actor, as ppo.py saves it
    actor = Model(open_source(str(zoo / "qwen2")), ParallelConfig(), head="lm", dtype="bfloat16", seed=1)
    actor_part = Part("", actor.modules, None, "lm", zoo / "qwen2")
    parts = [actor_part, dataclasses.replace(part, name="critic")]
    save(work / "run/checkpoints/step_5", parts, {"stage": "ppo", "step": 5, "dtype": "float32"})
    save(work / "half.mrlhf", parts[:1], {"stage": "sft", "step": 5, "dtype": "bfloat16"})
    (work / "run/config.yaml").write_text(f"model: {{path: {zoo / 'qwen2'}}}\ndata: {{train: data/prompts}}\n")
    rows = [{"step": step, "critic/score/mean": score} for step, score in ((4, 0.5), (5, 0.75), (6, 9.0))]
    (work / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hf.megatron_to_hf(str(work / "run"), work / "actor.hf")
    hf.megatron_to_hf(str(work / "run"), work / "critic.hf", part="critic")
    hf.megatron_to_hf(str(work / "half.mrlhf"), work / "half.hf")

    for dtype in ("float16", "bfloat16", "float32"):
        made_hf = hf.megatron_to_hf(str(work / "qwen2.mrlhf"), work / f"{dtype}.hf", dtype=dtype)
        result[f"as {dtype}"] = compare_models(made_hf.source, str(made_hf.path)).max_abs
    narrow = hf.hf_to_megatron(str(zoo / "qwen2"), work / "narrow.mrlhf", dtype="bfloat16")
    result["narrow"] = [narrow.manifest["dtype"], compare_models(narrow, str(zoo / "qwen2")).max_abs]

    # a wrong mapping must show: rows of two heads swapped in the exported file
    from safetensors.torch import load_file, save_file

    wrong = work / "float32.hf" / "model.safetensors"
    tensors = load_file(wrong)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    q[:64] = q[:64].roll(32, 0).clone()
    save_file(tensors, wrong, metadata={"format": "pt"})
    result["swapped heads"] = compare_models(open_source(str(work / "qwen2.mrlhf")), str(work / "float32.hf")).ok

    def refusal(call) -> str:
        try:
            call()
        except MrlhfError as error:
            return f"{type(error).__name__}: {error.what}; {error.where}"
        return ""

    # Megatron's own save of the same model, and a checkpoint in which one bit has changed
    theirs = Model(open_source(str(work / "gemma3_text.mrlhf")), ParallelConfig(), head="lm", dtype="float32", seed=1)
    (work / "megatrons_own/dist").mkdir(parents=True)
    tensors = gpt.sharded_state(theirs.modules)
    dist_checkpointing.save(tensors, str(work / "megatrons_own/dist"), content_metadata=dict(gpt.CHECKPOINT_CONTENT))
    flipped = shutil.copytree(work / "llama.mrlhf", work / "flipped.mrlhf")
    (part_file,) = (flipped / "dist").glob("*.distcp")
    data = bytearray(part_file.read_bytes())
    data[len(data) // 2] ^= 0x40
    part_file.write_bytes(data)
    result["dry run"] = hf.plan_import(str(zoo / "phi3")).summary() + hf.plan_export(str(flipped), work / "x").summary()
    granite = hf.hf_to_megatron(str(zoo / "granite"), work / "granite.value", head="value")
    skeleton = Skeleton(value.spec, ParallelConfig(), head="lm", dtype=torch.float32)
    tensors = hf_tensors(value.spec, head="lm")
    lacking = {**tensors, "extra.weight": tensors["model.norm.weight"]}
    broken = dataclasses.replace(skeleton.parameters[1], blocks=skeleton.parameters[1].blocks[:-1])
    skeleton.parameters[1] = broken
    with torch.no_grad():
        actor.modules[0].decoder.final_layernorm.weight[0] = 1e5
    save(work / "large.mrlhf", parts[:1], {"stage": "sft", "step": 5, "dtype": "bfloat16"})
    result["refused"] = {
        "overflow": refusal(lambda: hf.megatron_to_hf(str(work / "large.mrlhf"), work / "large.hf", dtype="float16")),
        "existing": refusal(lambda: hf.hf_to_megatron(str(zoo / "qwen2"), work / "qwen2.mrlhf")),
        "existing hf": refusal(lambda: hf.megatron_to_hf(str(work / "qwen2.mrlhf"), work / "qwen2.hf")),
        "checkpoint as hf": refusal(lambda: hf.hf_to_megatron(str(work / "qwen2.mrlhf"), work / "x")),
        "hf as checkpoint": refusal(lambda: hf.megatron_to_hf(str(zoo / "qwen2"), work / "x")),
        "no critic": refusal(lambda: hf.megatron_to_hf(str(work / "qwen2.mrlhf"), work / "x", part="critic")),
        "value as lm": refusal(lambda: hf.hf_to_megatron(str(work / "rm.hf"), work / "x", head="lm")),
        "no classifier": refusal(lambda: hf.megatron_to_hf(str(granite.path), work / "x")),
        "flipped": refusal(lambda: hf.megatron_to_hf(str(flipped), work / "x")),
        "maps": refusal(lambda: hf.check_weight_map(skeleton, lacking, value.spec)),
        "other model": refusal(lambda: compare_models(open_source(str(work / "qwen2.mrlhf")), str(zoo / "qwen3"))),
    }
    names = [p.name for p in work.iterdir()]
    result["nothing left"] = sorted(n for n in names if n in ("x", "large.hf") or n.endswith(".tmp"))
    print("RESULT " + json.dumps(result))
    state.shutdown()


if __name__ == "__main__":
    main()
