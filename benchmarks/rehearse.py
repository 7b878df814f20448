"""What a rank of a large run holds, computes and sends, on a machine without a GPU (mrlhf/parallel/rehearsal.py).

Prints docs/gpu.md's table: one training step of single ranks of large worlds, beside what --dry-run estimates.

usage: python benchmarks/rehearse.py [NAME ...]
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("MRLHF_DEVICE", "rehearsal")  # before mrlhf.parallel is imported
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import numpy as np
import torch

from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.data.loader import MicroBatch, Sample, collate
from mrlhf.memory.activations import ActivationMemory, MicroBatchShape, stage_activations
from mrlhf.memory.model_state import ModelMemory, stage_memory
from mrlhf.models import gpt
from mrlhf.models.families import spec_from_hf
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel import state
from mrlhf.parallel.rehearsal import Rehearsal, Report
from mrlhf.sft import language_model_loss
from mrlhf.training.trainer import LossFn, Trainer

GIB = 2**30
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
          "rope_theta": 5e5, "tie_word_embeddings": False, "hidden_act": "silu", "num_key_value_heads": 8}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32},
    "Llama-3.1-70B": {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64},
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
                      "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                      "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                      "tie_word_embeddings": False, "hidden_act": "silu", "num_experts": 128,
                      "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
                      "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False},
    "DeepSeek-V3": {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
                    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
                    "vocab_size": 129280, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
                    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
                    "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
                    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": 256,
                    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
                    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
                    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0, "rope_theta": 10000,
                    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One rank of a world, and its micro-batches: packs of samples of these lengths."""

    model: str
    world: int
    rank: int
    parallel: dict[str, Any]
    lengths: tuple[int, ...] = (2048,) * 4
    micro_batches: int = 2


_TP8 = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
_PP4 = {**_TP8, "pipeline_model_parallel_size": 4}
_PP8 = {**_TP8, "pipeline_model_parallel_size": 8, "expert_model_parallel_size": 32,
        "num_layers_in_first_pipeline_stage": 7, "num_layers_in_last_pipeline_stage": 6}  # fmt: skip
RUNS = {
    "8b": Run("Llama-3.1-8B", 1024, 777, _TP8),
    "70b-first": Run("Llama-3.1-70B", 256, 5, _PP4, micro_batches=4),
    "70b-last": Run("Llama-3.1-70B", 256, 200, _PP4, micro_batches=4),
    "30b-a3b": Run("Qwen3-30B-A3B", 8, 3, {"expert_model_parallel_size": 8, "recompute": "full"}),
    "deepseek-v3": Run("DeepSeek-V3", 1024, 389, {**_PP8, "recompute": "full"}, (2048,) * 2, 8),
}


@dataclass(frozen=True)
class Outcome:
    """The step's report, and what --dry-run estimates for this rank."""

    report: Report
    model: ModelMemory
    update: ActivationMemory
    seconds: float

    @property
    def peak(self) -> int:
        return self.report.peaks["step"].nbytes

    @property
    def estimate(self) -> int:
        return self.model.total + self.update.total


def make_batch(spec: ModelSpec, lengths: tuple[int, ...], *, packing: bool, side: str, multiple: int) -> MicroBatch:
    draw = np.random.default_rng(0)
    samples = [Sample(draw.integers(3, spec.vocab_size, n), np.ones(n, np.uint8), i) for i, n in enumerate(lengths)]
    return collate(samples, packing=packing, padding_side=side, pad_multiple=multiple)


def _last_values(values_BT1: torch.Tensor, batch: MicroBatch) -> Any:
    total = batch.last(values_BT1.squeeze(-1)).sum()
    return total, batch.weights_N.sum(), {}


def rehearse(spec: ModelSpec, parallel: ParallelConfig, *, world: int, rank: int, lengths: tuple[int, ...],
             micro_batches: int, packing: bool = True, side: str = "right", dtype: str = "bfloat16", head: str = "lm",
             optim: OptimConfig | None = None) -> Outcome:  # fmt: skip
    """The second of two steps of SFT (head "value": of the sum of values): the first makes the optimizer's state."""
    began, optim = time.perf_counter(), optim or OptimConfig()
    source = ModelSource(Path("."), Path("."), spec, head, {})
    with Rehearsal(rank=rank, world=world) as rehearsal, mock.patch.object(gpt, "fill"):
        layout = state.initialize(parallel, seed=1)
        with rehearsal.tracing("build"):
            trainer = Trainer(source, parallel, optim, head=head, dtype=dtype, seed=1, total_steps=9, random_init=True)
        loss: LossFn = language_model_loss(trainer, aggregation="token") if head == "lm" else _last_values
        batch = make_batch(spec, lengths, packing=packing, side=side, multiple=state.pad_multiple(parallel))
        for phase in ("first", "step"):
            with rehearsal.tracing(phase):
                trainer.step([batch] * micro_batches, loss)
            rehearsal.name_parts(trainer)
        report = rehearsal.report()
    stage, rows = layout.coordinates(rank)[2], 1 if packing else len(lengths)
    shape = MicroBatchShape(batch.tokens_BT.numel(), batch.max_seqlen, rows, packing)
    sizes = stage_memory(spec, layout, dtype=dtype, head=head, distributed_optimizer=optim.use_distributed_optimizer)
    moments = stage_activations(spec, parallel, shape, dtype=dtype, head=head, micro_batches=micro_batches)[stage]
    worst = max(moments, key=lambda moment: moment.total)
    return Outcome(report, sizes[stage], worst, time.perf_counter() - began)


def _gib(*sizes: float) -> str:
    return " | ".join(f"{size / GIB:.2f}" for size in sizes)


def main() -> None:
    print("| rank | weights | gradients | optimizer | activations and temporary tensors | peak, GiB | --dry-run | "
          "of it kept, recomputed, temporary | FLOPs | host waits |\n|" + "---|" * 10)  # fmt: skip
    messages = []
    for name in sys.argv[1:] or RUNS:
        run = RUNS[name]
        spec = spec_from_hf(MODELS[run.model], where=run.model)
        done = rehearse(spec, ParallelConfig(**run.parallel), world=run.world, rank=run.rank, lengths=run.lengths,
                        micro_batches=run.micro_batches)  # fmt: skip
        parts, update = done.report.peaks["step"].parts, done.update
        held = [parts.get(kind, 0) for kind in ("weights", "gradients", "optimizer")]
        waits = sum(done.report.waits("step").values())
        print(f"| {run.model}, rank {run.rank:,} of {run.world:,} | {_gib(*held, done.peak - sum(held), done.peak)} | "
              f"{_gib(done.estimate)} ({done.estimate / done.peak - 1:+.1%}) | "
              f"{' + '.join(_gib(size) for size in (update.kept, update.again, update.work))} ({update.moment}) | "
              f"{done.report.flops['step']:.2e} | {waits} |", flush=True)  # fmt: skip
        print(f"{name}: {done.seconds:.0f} s", file=sys.stderr)
        sent: dict[str, int] = {}
        for (phase, op, group), traffic in done.report.collectives.items():
            if phase == "step":
                sent[f"{op} {group}"] = traffic.nbytes
        largest = sorted(sent.items(), key=lambda item: -item[1])[:6]
        messages.append(f"| {run.model}, rank {run.rank:,} | {', '.join(f'{k} {v / GIB:.2f}' for k, v in largest)} |")
    print("\n| rank | GiB of collectives by group |\n|---|---|\n" + "\n".join(messages))


if __name__ == "__main__":
    main()
