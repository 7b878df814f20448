"""One optimizer step: micro-batches -> Megatron's schedule -> clip -> step. Also forward passes without gradient.

A stage hands over micro-batches and a loss function `loss(output, batch) -> (sum, count, partials)`:
  sum       fp32 scalar with gradient, over this micro-batch's trained tokens (or pairs, or answers)
  count     how many there are
  partials  {metric: tensor [sum, count]} (see metrics.py)
Normalisation happens once: Megatron adds gradients over micro-batches and data-parallel ranks without scaling
(calculate_per_token_loss) and `finalize_model_grads` divides them by the step's global count. So neither
the micro-batch size nor the number of ranks changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from mrlhf import metrics
from mrlhf.checkpoint import ModelSource, Part, load_optimizer, load_weights
from mrlhf.config import OptimConfig, ParallelConfig
from mrlhf.data.loader import MicroBatch
from mrlhf.models import gpt
from mrlhf.parallel import adam, device, state
from mrlhf.parallel.logprobs import head_logprobs

Partials = dict[str, torch.Tensor]
LossFn = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, Partials]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_scheduler(optimizer: Any, optim: OptimConfig, *, total_steps: int) -> OptimizerParamScheduler:
    """Megatron's schedule, advanced by 1 before each step: step k of N runs at lr(k), and min_lr would come at N + 1, so no step is spent at 0."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=min(optim.lr_warmup_steps, total_steps),
        lr_decay_steps=total_steps + 1,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=total_steps + 1,
        wd_incr_style="constant",
        wsd_decay_steps=min(optim.lr_wsd_decay_steps, total_steps) or None,
        lr_wsd_decay_style="linear",
    )


class Model:
    """This rank's part of a GPT model: forward passes only (reference, reward model, scoring)."""

    def __init__(
        self, source: ModelSource, parallel: ParallelConfig, *, head: str, dtype: str, seed: int, random_init: bool = False
    ) -> None:
        self.source, self.spec, self.head, self.dtype = source, source.spec, head, dtype
        self.config = gpt.transformer_config(self.spec, parallel, dtype=DTYPES[dtype])
        self.module = gpt.build_model(self.spec, self.config, head=head)
        if random_init:
            gpt.fill(self.module, self.spec, gpt.RandomSource(self.spec, head=head, seed=seed), head=head)
        else:
            load_weights(source, self.module, head=head, seed=seed)
        self.chunk: torch.nn.Module = self.module
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.device = device.current().name

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by Megatron's name with the global layer index."""
        return {name: p.data for name, p in gpt.local_parameters(self.module)}

    def logprobs(
        self,
        hidden_BTH: torch.Tensor,
        batch: MicroBatch,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        keep_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the batch's targets, from an LM's output: (log-prob, entropy, is the most likely token), [B, T] each; see `head_logprobs`."""
        head = gpt.lm_head(self.module, self.spec)
        return head_logprobs(hidden_BTH, batch.targets_BT, head, temperature=temperature, with_entropy=with_entropy, keep=keep_BT)

    def _schedule(self, micro_batches: list[MicroBatch], step: Callable, *, forward_only: bool, collect: bool = False) -> list:
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(micro_batches),
            model=[self.chunk],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens_BT.size(1),
            micro_batch_size=micro_batches[0].tokens_BT.size(0),
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )

    @torch.no_grad()
    def forward(
        self, micro_batches: list[MicroBatch], fn: Callable[[torch.Tensor, MicroBatch], torch.Tensor], *, channels: int
    ) -> list[torch.Tensor]:
        """`fn(output, batch)` -> fp32 [channels, B, T] of every micro-batch, on every pipeline stage, without gradient."""
        self.chunk.eval()

        def step(iterator, model):
            batch = next(iterator).to(self.device)
            return gpt.run(model, batch), lambda output, non_loss_data=False: fn(output, batch)

        outputs = self._schedule(micro_batches, step, forward_only=True, collect=True)
        self.chunk.train()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            if not self.is_last_stage:
                outputs = [torch.empty(channels, *b.tokens_BT.shape, device=self.device) for b in micro_batches]
            for output in outputs:
                dist.broadcast(
                    output,
                    src=parallel_state.get_pipeline_model_parallel_last_rank(),
                    group=parallel_state.get_pipeline_model_parallel_group(),
                )
        return outputs

    def _loss_step(self, loss_fn: LossFn) -> Callable:
        def step(iterator, model):
            batch = next(iterator).to(self.device)

            def loss(output):
                total, count, partials = loss_fn(output, batch)
                # the copy goes to the log; Megatron's schedule divides what it is given in place
                return total, count.to(torch.int), {**partials, "loss": torch.stack([total.detach(), count.detach().float()])}

            return gpt.run(model, batch), loss

        return step

    def _reduce(self, results: list[Partials]) -> Partials:
        """Partials of this step over micro-batches and data-parallel ranks, on every rank."""
        partials = metrics.all_reduce(metrics.merge(results), parallel_state.get_data_parallel_group()) if self.is_last_stage else {}
        return state.from_last_stage({k: v.cpu() for k, v in partials.items()})

    @torch.no_grad()
    def evaluate(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> Partials:
        """The loss function without gradient; partials as of one step."""
        self.chunk.eval()
        results = self._schedule(micro_batches, self._loss_step(loss_fn), forward_only=True)
        self.chunk.train()
        return self._reduce(results)


class Trainer(Model):
    """A model with gradients, optimizer and learning-rate schedule."""

    def __init__(
        self,
        source: ModelSource,
        parallel: ParallelConfig,
        optim: OptimConfig,
        *,
        head: str,
        dtype: str,
        seed: int,
        total_steps: int,
        random_init: bool = False,
    ) -> None:
        super().__init__(source, parallel, head=head, dtype=dtype, seed=seed, random_init=random_init)
        self.adam = adam.install()
        self.chunk = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(use_distributed_optimizer=optim.use_distributed_optimizer, grad_reduce_in_fp32=True),
            self.module,
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.adam_beta1,
                adam_beta2=optim.adam_beta2,
                adam_eps=optim.adam_eps,
                clip_grad=optim.clip_grad,
                use_distributed_optimizer=optim.use_distributed_optimizer,
                bf16=dtype == "bfloat16",
                params_dtype=DTYPES[dtype],
            ),
            [self.chunk],
        )
        self.scheduler = make_scheduler(self.optimizer, optim, total_steps=total_steps)

    def step(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        """One optimizer step. Returns the reduced metrics with `loss`, `grad_norm` (before clipping) and `lr`.

        Raises FloatingPointError when loss or gradient norm is not finite: on all ranks, before anything is saved.
        """
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._schedule(micro_batches, self._loss_step(loss_fn), forward_only=False)
        self.scheduler.step(increment=1)
        _, grad_norm, _ = self.optimizer.step()
        found = metrics.finalize(self._reduce(results))
        found["grad_norm"], found["lr"] = float(grad_norm), self.lr
        if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
            raise FloatingPointError(f"loss {found['loss']}, gradient norm {found['grad_norm']}: stopped; the last checkpoint is whole")
        return found

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def part(self, name: str = "", *, with_optimizer: bool = True) -> Part:
        return Part(name, self.module, self.optimizer if with_optimizer else None, self.head, self.source.hf_dir)

    def resume(self, directory: Any, steps_done: int) -> None:
        """Weights, optimizer state and schedule as after `steps_done` steps of this trainer."""
        load_optimizer(directory, self.module, self.optimizer)
        self.scheduler.step(increment=steps_done)
