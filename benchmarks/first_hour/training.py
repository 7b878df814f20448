"""The parts that train: real sizes, random weights, one GPU. In a rehearsal the same calls run on fake CUDA tensors."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from first_hour.report import Report

GIB = 2**30
WARM_UP, STEPS = 2, 5
QWEN_1_5B: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
LLAMA_3B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}  # fmt: skip
LLAMA_8B: dict[str, Any] = LLAMA_3B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}  # fmt: skip


@contextlib.contextmanager
def world(parallel: Any, *, rehearsal: bool) -> Iterator[Any]:
    """A world of this process. Yields what a step runs under."""
    from mrlhf.parallel import state

    if not rehearsal:
        state.initialize(parallel, seed=1)
        yield contextlib.nullcontext
        return
    from mrlhf.parallel.rehearsal import Rehearsal

    with Rehearsal() as rehearsed:
        state.initialize(parallel, seed=1)
        yield lambda: rehearsed.tracing("step")


def fill_on_device(model: Any, spec: Any, *args: Any, **kwargs: Any) -> None:
    """Instead of values from a seed, which are drawn on the host: minutes for some billion."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)


def make_trainer(config: dict[str, Any], parallel: Any) -> Any:
    from mrlhf.checkpoint.source import ModelSource
    from mrlhf.config.options import OptimConfig
    from mrlhf.models import gpt
    from mrlhf.models.families import spec_from_hf
    from mrlhf.training.trainer import Trainer

    gpt.fill = fill_on_device
    source = ModelSource(Path("."), Path("."), spec_from_hf(config, where=config["model_type"]), "lm", {})
    options = {"dtype": "bfloat16", "seed": 1, "total_steps": 100}
    return Trainer(source, parallel, OptimConfig(lr=1e-6), head="lm", random_init=True, **options)


def random_batch(vocab_size: int, lengths: list[int]) -> Any:
    import numpy as np

    from mrlhf.data.loader import Sample, collate

    rng = np.random.default_rng(0)
    ids = [rng.integers(3, vocab_size, n) for n in lengths]
    return collate([Sample(x, np.ones(len(x), np.uint8), i) for i, x in enumerate(ids)], packing=True)


def estimate_gib(spec: Any, parallel: Any, lengths: list[int]) -> float:
    """What --dry-run says of this step."""
    from mrlhf.memory.activations import MicroBatchShape, stage_activations
    from mrlhf.memory.model_state import stage_memory
    from mrlhf.parallel.state import Layout

    held = stage_memory(spec, Layout.from_config(parallel, 1), dtype="bfloat16")[0].total
    shape = MicroBatchShape(sum(lengths), max(lengths), 1, True)
    moments = stage_activations(spec, parallel, shape, dtype="bfloat16", micro_batches=1)[0]
    return (held + max(moment.total for moment in moments)) / GIB


def layers_that_fit(config: dict[str, Any], parallel: Any, lengths: list[int], *, most: int) -> int:
    """Layers whose step takes at most nine tenths of the free memory by --dry-run's estimate."""
    import torch

    from mrlhf.models.families import spec_from_hf

    free, layers = torch.cuda.mem_get_info()[0] / GIB, min(most, config["num_hidden_layers"])
    while layers > 1:
        spec = spec_from_hf(config | {"num_hidden_layers": layers}, where="")
        if estimate_gib(spec, parallel, lengths) < 0.9 * free:
            break
        layers -= 1
    return layers


def measure(report: Report, name: str, config: dict[str, Any], lengths: list[int], *, recompute: str = "none") -> None:
    """Optimizer steps of one model on one pack: time, rates, the peak beside --dry-run's estimate."""
    import torch

    from mrlhf.config.options import ParallelConfig

    parallel, what = ParallelConfig(recompute=recompute), f"{name}, {sum(lengths):,} tokens"
    with world(parallel, rehearsal=report.rehearsal) as context:
        # a rehearsed layer is like the next one: two are enough
        layers = layers_that_fit(config, parallel, lengths, most=2 if report.rehearsal else 999)
        if layers < config["num_hidden_layers"]:
            name += f", {layers} of {config['num_hidden_layers']} layers"
        try:
            with context():
                trainer = make_trainer(config | {"num_hidden_layers": layers}, parallel)
            seconds, peak, values = time_steps(
                trainer, lengths, context, count=2 if report.rehearsal else WARM_UP + STEPS
            )
        except torch.OutOfMemoryError as error:
            report.check(f"{what}: it fits", False, str(error).splitlines()[0])
        else:
            told = estimate_gib(trainer.spec, parallel, lengths)
            row = {"model": name, "tokens": sum(lengths), "recompute": recompute}
            row |= rates(trainer.spec, lengths, seconds, rehearsal=report.rehearsal)
            report.figure(**row, **{"peak GiB": peak, "dry run GiB": told, "peak/dry run": peak / told})
            finite = abs(values["grad_norm"]) < 1e6
            report.check(f"{what}: loss and gradient are finite", finite, f"loss {values['loss']:.3f}")
            report.check(f"{what}: the peak is at most 5 % above --dry-run's", peak < 1.05 * told)
        trainer = None
    gc.collect()
    torch.cuda.empty_cache()


def time_steps(
    trainer: Any, lengths: list[int], context: Any, *, count: int
) -> tuple[list[float], float, dict[str, float]]:
    """Seconds of each step, the peak of all but the first in GiB, and the last one's metrics."""
    import torch

    from mrlhf.sft import language_model_loss

    loss, batch = language_model_loss(trainer, aggregation="token"), random_batch(trainer.spec.vocab_size, lengths)
    seconds, values = [], {}
    for step in range(count):
        with context():
            if step == 1:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            values = trainer.step([batch], loss)
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated() / GIB, values


def rates(spec: Any, lengths: list[int], seconds: list[float], *, rehearsal: bool) -> dict[str, Any]:
    from mrlhf.parallel.peak_rates import peak_tflops

    tflop = spec.flops_per_token(sum(lengths) / len(lengths)) * sum(lengths) / 1e12
    row: dict[str, Any] = {"TFLOP a step": tflop}
    if not rehearsal:
        middle, peak = sorted(seconds[WARM_UP:])[STEPS // 2], peak_tflops("bfloat16")
        row |= {"s a step": middle, "tokens/s": sum(lengths) / middle, "TFLOP/s": tflop / middle}
        row["MFU"] = tflop / middle / peak if peak else "peak not known"
    return row


def sft(report: Report) -> None:
    for name, config in (("Qwen2.5-1.5B", QWEN_1_5B), ("Llama-3.2-3B", LLAMA_3B), ("Llama-3.1-8B", LLAMA_8B)):
        measure(report, name, config, [1024] * 8)
    measure(report, "Qwen2.5-1.5B, full rows", QWEN_1_5B, [8192])
    measure(report, "Qwen2.5-1.5B", QWEN_1_5B, [1024] * 32, recompute="full")


def long_context(report: Report) -> None:
    for tokens in (32768,) if report.rehearsal else (32768, 65536, 131072):
        measure(report, "Qwen2.5-1.5B", QWEN_1_5B, [tokens], recompute="full")


def experts(report: Report) -> None:
    measure(report, "Qwen3-30B-A3B", QWEN_30B_A3B, [1024] * 8)
    measure(report, "Qwen3-30B-A3B", QWEN_30B_A3B, [1024] * 16, recompute="full")


def families(report: Report) -> None:
    """One model a kind of layer, four layers of real widths, in bf16 against transformers."""
    from zoo import KINDS

    names = ("llama", "qwen2_window", "qwen3", "gemma2", "gemma3_text", "glm4", "mixtral", "qwen3_moe", "deepseek_v3")
    if report.rehearsal:
        report.say("values do not exist on fake tensors: tests/gpu/test_families.py runs this comparison on the CPU")
        return measure(report, "Qwen2.5-1.5B", QWEN_1_5B | {"num_hidden_layers": 4}, [300, 1, 700])
    import tempfile

    import torch
    from conftest import make_hf_model
    from gpu.test_families import distances, our_result, random_rows, transformers_result

    from mrlhf.config.options import ParallelConfig

    with world(ParallelConfig(), rehearsal=False), tempfile.TemporaryDirectory() as folder:
        for kind in names:
            family, changes = KINDS[kind]
            sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
            model, rows = Path(folder) / kind, random_rows(4000, (300, 1, 700, 1024))
            make_hf_model(model, family, vocab_size=4000, **{**changes, **sizes, "max_position_embeddings": 2048})  # type: ignore[arg-type]
            exact = transformers_result(model, "cuda", torch.float32, rows)
            noise = distances(transformers_result(model, "cuda", torch.bfloat16, rows), exact)
            ours = distances(our_result(model, "bfloat16", "packed", rows), exact)
            for what in ("logits", "gradients"):
                ratio = ours[what] / noise[what]
                report.check(f"{kind}: {what} as near to fp32 as transformers' bf16", ratio < 2, f"{ratio:.2f} times")
            report.figure(kind=kind, **{f"{k}, ours": v for k, v in ours.items()},
                          **{f"{k}, transformers": v for k, v in noise.items()})  # fmt: skip
            torch.cuda.empty_cache()
