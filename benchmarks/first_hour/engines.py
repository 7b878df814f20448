"""The parts with a second engine on the card: vLLM beside the trainer, a GRPO step end to end, TRL for comparison."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from first_hour.report import Report
from first_hour.training import GIB, QWEN_1_5B, STEPS, WARM_UP, make_trainer, measure, random_batch, world

ROOT = Path(__file__).resolve().parents[2]
QWEN_0_5B = QWEN_1_5B | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14
}  # fmt: skip
REWARD = "def code_sum(prompts, completions, **_):\n    return [sum(map(ord, c)) % 7 / 7 for c in completions]\n"


def make_world(root: Path, config: dict[str, Any], prompts: int) -> None:
    """model/: random bf16 weights with a tokenizer; prompts.*: prompts; reward.py."""
    import torch
    from conftest import conversations, make_tokenizer, write_jsonl
    from transformers import AutoConfig, AutoModelForCausalLM

    from mrlhf.data.prepare.job import preprocess
    from mrlhf.data.prepare.options import PreprocessConfig

    options = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **options), dtype=torch.bfloat16
        )
    model.save_pretrained(root / "model")
    del model
    torch.cuda.empty_cache()
    chats = conversations(prompts)
    make_tokenizer(root / "model", [m["content"] for chat in chats for m in chat] + ["system user assistant"])
    file = write_jsonl(root / "prompts.jsonl", [{"prompt": c[:-1], "label": len(c)} for c in chats])
    files = {"input": (str(file),), "tokenizer": str(root / "model"), "output_prefix": str(root / "prompts")}
    preprocess(PreprocessConfig(task="prompts", **files, seq_length=256, workers=4))
    (root / "reward.py").write_text(REWARD)


def options(root: Path, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "model.path": root / "model",
        "data.train": root / "prompts",
        "train.output_dir": root / "run",
        "train.max_steps": 3,
        "reward.sources": f"{root / 'reward.py'}:code_sum",
        "ppo.estimator": "grpo",
        "kl.in_loss": "true",
        "kl.kind": "k3",
        "loss.aggregation": "sequence",
        "offload.optimizer": "true",
        "offload.gradients": "true",
        "offload.reference": "true",
        **changes,
    }
    return [str(part) for key, value in values.items() for part in (f"--{key}", value)]


def no_engine(report: Report) -> bool:
    if find_spec("vllm") is None:
        report.skip("vllm is not installed")
    return bool(report.skipped)


def vllm(report: Report) -> None:
    """Start, two steps, sleep, wake and reshard, greedy answers before and after, log-probs of both engines."""
    if report.rehearsal:
        report.say("vLLM's start, kernels and memory pool are not rehearsed: it builds no model on fake tensors")
        return rehearse_reshard(report)
    if no_engine(report):
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_world(root, QWEN_0_5B, 64)
        sizes = {"rollout.batch_size": 16, "rollout.n": 4, "rollout.max_new_tokens": 128}
        sizes |= {"train.global_batch_size": 64, "train.micro_batch_size": 8}
        program = [sys.executable, "tests/gpu/rl_program.py", str(root / "result.json"), *options(root, **sizes)]
        done = subprocess.run(program, cwd=ROOT, timeout=500, text=True, capture_output=True)
        report.check("vLLM starts beside the trainer, and two GRPO steps end", done.returncode == 0, "Qwen2.5-0.5B")
        if done.returncode:
            return report.say("```\n" + (done.stdout + done.stderr)[-4000:] + "\n```")
        found = json.loads((root / "result.json").read_text())
    seconds, memory, last = found["seconds"], found["memory"], found["logs"][-1]
    report.check(
        "asleep and written again, vLLM gives the same greedy answers", found["answers"][0] == found["answers"][1]
    )
    report.check("asleep, vLLM gives its memory back", memory["asleep"] < memory["awake"] - 0.1)
    report.check("trainer and vLLM agree", last["rollout/kl_mismatch"] < 1e-3, f"{last['rollout/kl_mismatch']:.2e}")
    report.figure(**{f"{name}, s": value for name, value in seconds.items()})
    report.figure(**{f"{name}, GiB of the card": value for name, value in memory.items()})
    moved = last["reshard/bytes"] or found["copied"]
    report.figure(**{"reshard, bytes": moved, "GB/s": moved / 1e9 / max(1e-9, last["reshard/seconds"])})
    names = (
        "rollout/logprob_abs_diff_mean",
        "rollout/logprob_abs_diff_max",
        "rollout/kl_mismatch",
        "actor/ratio_max_dev",
    )
    report.figure(**{name: last[name] for name in names if name in last})


def rehearse_reshard(report: Report) -> None:
    """The trainer's weights into tensors of vLLM's shapes, by the plan of a run."""
    import torch

    from mrlhf.config.options import ParallelConfig
    from mrlhf.models.families import hf_tensors, vllm_map
    from mrlhf.models.reshard_plan import make_weight_update
    from mrlhf.parallel import state

    with world(ParallelConfig(), rehearsal=True) as context, context():
        trainer = make_trainer(QWEN_0_5B, ParallelConfig())
        spec = trainer.spec
        shapes = {name: tensor.shape for name, tensor in hf_tensors(spec, head="lm").items()}
        targets = {}
        for name, blocks in vllm_map(spec, tp=1, rank=0).items():
            shape = list(shapes[blocks[0].hf])
            shape[blocks[0].dim] = max(b.offset + b.length for b in blocks)
            targets[name] = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        update = make_weight_update(
            spec, state.groups().layout, rollout_tp=1, rank=0, dtype=torch.bfloat16, bucket_bytes=512 << 20
        )
        update.exchange(trainer.parameters(), targets, lambda name, weight: None)
        report.check(
            "every weight of Qwen2.5-0.5B goes to vLLM's shapes", update.copied > 0, f"{update.copied:,} bytes"
        )


def grpo(report: Report) -> None:
    """`mrlhf ppo` on a model of 1.5 billion: seconds by phase, and the peak beside --dry-run's."""
    if report.rehearsal:
        report.say("generation is not rehearsed; the update of the actor and its peak are")
        return measure(report, "Qwen2.5-1.5B", QWEN_1_5B, [384] * 32)
    if no_engine(report):
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_world(root, QWEN_1_5B, 64)
        sizes = {"rollout.batch_size": 32, "rollout.n": 8, "rollout.max_new_tokens": 256}
        sizes |= {"train.global_batch_size": 256, "train.micro_batch_size": 16}
        command = [sys.executable, "-m", "mrlhf", "ppo", *options(root, **sizes)]
        dry = subprocess.run([*command, "--dry-run"], cwd=ROOT, timeout=200, text=True, capture_output=True)
        report.check("--dry-run finds nothing wrong", dry.returncode == 0)
        report.say("```\n" + (dry.stdout + dry.stderr)[-2500:].strip() + "\n```")
        done = subprocess.run(command, cwd=ROOT, timeout=450, text=True, capture_output=True)
        report.check("three GRPO steps of 256 answers", done.returncode == 0)
        if done.returncode:
            return report.say("```\n" + (done.stdout + done.stderr)[-4000:] + "\n```")
        rows = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "timing_s/step" in row):
        report.figure(**{k.removeprefix("timing_s/"): v for k, v in row.items() if k.startswith("timing_s/")})
    report.figure(**{k: v for k, v in rows[-1].items() if k.startswith("memory/")})
    told = max(map(float, re.findall(r"([\d.]+) GiB", dry.stdout)), default=0.0)
    peak = max((row.get("memory/peak_gib", 0.0) for row in rows), default=0.0)
    report.check("the peak is at most 5 % above the largest figure of --dry-run", peak < 1.05 * told, f"{peak:.1f} GiB")


def trl(report: Report) -> None:
    """Optimizer steps of TRL's SFTTrainer on the model and the tokens of the part sft."""
    if report.rehearsal:
        report.say("TRL is another program: nothing of it is rehearsed")
        return measure(report, "Qwen2.5-1.5B, what TRL is compared with", QWEN_1_5B, [8192])
    if find_spec("trl") is None:
        return report.skip("trl is not installed")
    measure(report, "Qwen2.5-1.5B", QWEN_1_5B, [8192])
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder, seconds = tempfile.mkdtemp(), [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter())

    options_of = {k: v for k, v in QWEN_1_5B.items() if k not in ("model_type", "architectures")}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **options_of), dtype=torch.bfloat16)
    from conftest import make_tokenizer
    from transformers import AutoTokenizer

    make_tokenizer(Path(folder) / "tokenizer", ["user assistant"])
    ids = random_batch(QWEN_1_5B["vocab_size"], [8192]).tokens_BT[0].tolist()
    arguments = SFTConfig(
        output_dir=folder, max_steps=WARM_UP + STEPS, per_device_train_batch_size=1, max_length=8192, bf16=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", learning_rate=1e-6,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [ids] * (WARM_UP + STEPS)})
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    torch.cuda.reset_peak_memory_stats()
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    middle = statistics.median(b - a for a, b in zip(seconds[WARM_UP + 1 :], seconds[WARM_UP + 2 :]))
    row = {"s a step": middle, "tokens/s": 8192 / middle, "peak GiB": torch.cuda.max_memory_allocated() / GIB}
    report.figure(program="TRL, bf16 weights and bf16 Adam", tokens=8192, **row)
    report.check("TRL's steps end", len(seconds) > WARM_UP + STEPS)
    shutil.rmtree(folder)
