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

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from mrlhf.checkpoint.save import Part
from mrlhf.checkpoint.source import ModelSource, load_optimizer, load_weights
from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.data.loader import MicroBatch
from mrlhf.models import gpt
from mrlhf.models.layers import neftune
from mrlhf.models.layers.logprobs import Head, OfTargets, head_logprobs
from mrlhf.models.layers.router import Router
from mrlhf.models.layers.router_losses import Balance, Balancer, StepBalance, samples_of
from mrlhf.observe import metrics
from mrlhf.parallel import device, state
from mrlhf.parallel.context import gather_tokens, sum_over_ranks
from mrlhf.training import adam

log = logging.getLogger(__name__)
Partials = dict[str, torch.Tensor]
LossFn = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, Partials]]
MAX_SKIPPED = 10  # steps in a row: by then it is not a matter of single samples
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


def _samples(micro_batches: list[MicroBatch]) -> list[int]:
    """Their indices in the data set, without fillers."""
    return [i for b in micro_batches for i, weight in zip(b.index_N.tolist(), b.weights_N.tolist(), strict=True) if weight]


def _shorten(indices: list[int], most: int = 20) -> str:
    found = sorted(set(indices))
    return ", ".join(map(str, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")


def _local_part(batch: MicroBatch) -> MicroBatch:
    """This context-parallel rank's tokens of a micro-batch; the batch itself without context parallelism."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return batch
    width = batch.tokens_BT.size(1)
    assert width % size == 0, (width, size)
    part = width // size
    first = rank * part
    row_N, place_N = batch.last_N // width, batch.last_N % width - first
    per_token = {name: x for name, x in vars(batch).items() if name.endswith("_BT") and x is not None}
    return replace(
        batch,
        **{name: x_BT[:, first : first + part].contiguous() for name, x_BT in per_token.items()},
        last_N=torch.where((place_N >= 0) & (place_N < part), row_N * part + place_N, -1),
        first=first,
        over_ranks=sum_over_ranks,
    )


class Model(state.HasGroups):
    """This rank's part of a GPT model (its parts, in an interleaved pipeline): forward passes only (reference, reward model, scoring).

    It is built for the groups that are in force, and works in them whatever other models are built for.
    """

    def __init__(
        self, source: ModelSource, parallel: ParallelConfig, *, head: str, dtype: str, seed: int, random_init: bool = False
    ) -> None:
        self.source, self.spec, self.head, self.dtype = source, source.spec, head, dtype
        self.groups = state.groups()
        self.config = gpt.transformer_config(self.spec, parallel, dtype=DTYPES[dtype])
        pieces = parallel.virtual_pipeline_model_parallel_size
        stages = [None] if pieces is None else list(range(pieces))
        self.modules = [gpt.build_model(self.spec, self.config, head=head, vp_stage=stage) for stage in stages]
        if random_init:
            for module in self.modules:
                gpt.fill(module, self.spec, gpt.RandomSource(self.spec, head=head, seed=seed), head=head)
        else:
            load_weights(source, self.modules, head=head, seed=seed)
        self.chunks: list[torch.nn.Module] = list(self.modules)  # as the schedule runs them: a trainer wraps them
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.device = device.current().name

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by Megatron's name with the global layer index."""
        return {name: p.data for module in self.modules for name, p in gpt.local_parameters(module)}

    def tensors(self, kind: str) -> list[torch.Tensor]:
        """Everything on the device of one kind: "weights"; of a trainer also "optimizer" (moments, fp32 weights) and "gradients"."""
        assert kind == "weights", kind
        return [p.data for module in self.modules for p in (*module.parameters(), *module.buffers())]

    def logprobs(
        self,
        hidden_BTH: torch.Tensor,
        batch: MicroBatch,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        keep_BT: torch.Tensor | None = None,
    ) -> OfTargets:
        """Of the batch's targets, from an LM's output, [B, T] each; see `head_logprobs`."""
        return head_logprobs(hidden_BTH, batch.targets_BT, self._head(), temperature=temperature, with_entropy=with_entropy, keep=keep_BT)

    def _head(self) -> Head:
        return gpt.lm_head(self.modules[-1], self.spec)

    def _schedule(self, micro_batches: list[MicroBatch], step: Callable, *, forward_only: bool, collect: bool = False) -> list:
        iterators = [iter(micro_batches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens_BT.size(1),
            micro_batch_size=micro_batches[0].tokens_BT.size(0),
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )

    @state.in_own_groups
    @torch.no_grad()
    def forward(
        self, micro_batches: list[MicroBatch], fn: Callable[[torch.Tensor, MicroBatch], torch.Tensor], *, channels: int
    ) -> list[torch.Tensor]:
        """`fn(output, batch)` -> fp32 [channels, B, T] of every micro-batch, on every pipeline stage, without gradient.

        Under context parallelism `fn` sees this rank's tokens; what comes back is whole.
        """
        self._train(False)

        def step(iterator, model):
            batch = _local_part(next(iterator).to(self.device))
            return gpt.run(model, batch), lambda output, non_loss_data=False: gather_tokens(fn(output, batch))

        outputs = self._schedule(micro_batches, step, forward_only=True, collect=True)
        self._train(True)
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

    def _train(self, on: bool) -> None:
        for chunk in self.chunks:
            chunk.train(on)

    def _loss_step(
        self, loss_fn: LossFn, noise: Callable[[MicroBatch], torch.Tensor] | None = None, balance: StepBalance | None = None
    ) -> Callable:
        def step(iterator, model):
            whole = next(iterator).to(self.device)
            batch = _local_part(whole)

            def loss(output):
                total, count, partials = loss_fn(output, batch)
                # the copy goes to the log; Megatron's schedule divides what it is given in place
                return total, count.to(torch.int), {**partials, "loss": torch.stack([total.detach(), count.detach().float()])}

            samples_BT = None if balance is None else samples_of(batch)
            return gpt.run(model, batch, noise=None if noise is None else lambda: noise(whole), samples_BT=samples_BT), loss

        return step

    def _reduce(self, results: list[Partials]) -> Partials:
        """Partials of this step over micro-batches, data- and context-parallel ranks, on every rank."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        partials = metrics.all_reduce(metrics.merge(results), group) if self.is_last_stage else {}
        return state.from_last_stage({k: v.cpu() for k, v in partials.items()})

    @state.in_own_groups
    @torch.no_grad()
    def evaluate(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> Partials:
        """The loss function without gradient; partials as of one step."""
        self._train(False)
        results = self._schedule(micro_batches, self._loss_step(loss_fn), forward_only=True)
        self._train(True)
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
        on_nonfinite: str = "stop",
        neftune_alpha: float = 0.0,
        balance: Balance | None = None,
    ) -> None:
        self.on_nonfinite, self.skipped_in_a_row = on_nonfinite, 0
        self.neftune_alpha, self.seed, self.steps_done = neftune_alpha, seed, 0
        super().__init__(source, parallel, head=head, dtype=dtype, seed=seed, random_init=random_init)
        self.balance = self._balancers(balance) if balance is not None else None
        self.adam = adam.install()
        reduces, gathers = self._overlaps(parallel, optim)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=optim.use_distributed_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=reduces or gathers,
            overlap_param_gather=gathers,
        )
        self.chunks = [DistributedDataParallel(self.config, ddp, module) for module in self.modules]
        self._gathers, self._to_gather = gathers, False
        if reduces or gathers:
            waits = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self.config.finalize_model_grads_func = self._finalize
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)  # of this rank and step
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
                overlap_param_gather=gathers,
                bf16=dtype == "bfloat16",
                params_dtype=DTYPES[dtype],
            ),
            self.chunks,
        )
        self.scheduler = make_scheduler(self.optimizer, optim, total_steps=total_steps)

    @staticmethod
    def _overlaps(parallel: ParallelConfig, optim: OptimConfig) -> tuple[bool, bool]:
        """(reduce gradients in backward, gather parameters in forward). The second needs Megatron's first."""
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1:
            return False, False
        wanted = (device.current().is_cuda if x is None else x for x in (parallel.overlap_grad_reduce, parallel.overlap_param_gather))
        reduces, gathers = wanted
        return reduces, gathers and optim.use_distributed_optimizer

    @state.in_own_groups
    def _settle(self) -> None:
        """Whole new parameters, where the next forward pass would have gathered them. Collective."""
        if self._to_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._to_gather = False

    def parameters(self) -> dict[str, torch.Tensor]:
        self._settle()
        return super().parameters()

    def _head(self) -> Head:
        """No forward hook waits for its weight: it is used outside of its module."""
        head = super()._head()
        if self._gathers:
            self.chunks[-1].param_to_bucket_group[head.weight_WH].finish_param_sync()
        return head

    def _balancers(self, balance: Balance) -> StepBalance:
        found = []
        for router in (m for module in self.modules for m in module.modules() if isinstance(m, Router)):
            router.balancer = Balancer(balance)
            found.append(router.balancer)
        return StepBalance(balance, found, layers=sum(layer.moe for layer in self.spec.layers))

    @state.in_own_groups
    def step(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        """One optimizer step. Returns the reduced metrics with `loss`, `grad_norm` (before clipping) and `lr`; `skipped` under on_nonfinite skip,
        `moe_aux_loss` and `moe_z_loss` with auxiliary losses of the routers, which `loss` does not contain.

        A loss or gradient norm that is not finite, on any rank, leaves parameters and optimizer state as they were on all.
        Raises FloatingPointError then, naming the samples, or, with skip, for the last of MAX_SKIPPED in a row.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        noise = self._noise if self.neftune_alpha else None
        if self.balance is not None:
            self.balance.begin(_local_part(b.to(self.device)) for b in micro_batches)
        self._count.zero_()
        results = self._schedule(micro_batches, self._loss_step(self._counted(loss_fn), noise, self.balance), forward_only=False)
        self._last = (micro_batches, results)
        self.steps_done += 1
        self.scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        reduced = self._reduce(results)
        found = metrics.finalize(reduced)
        if self.balance is not None:
            found |= self.balance.finish(float(reduced["loss"][1]))
        found["grad_norm"], found["lr"] = grad_norm, self.lr
        bad = not (math.isfinite(found["loss"]) and math.isfinite(grad_norm))
        if state.on_any_rank(bad):
            self._nonfinite(micro_batches, results, found)
        else:
            self._apply(grad_norm)
            self.skipped_in_a_row = 0
        if self.on_nonfinite == "skip":
            found["skipped"] = float(self.skipped_in_a_row > 0)
        return found

    @state.in_own_groups
    def micro_batch_losses(self) -> list[tuple[float, tuple[int, ...]]]:
        """(mean loss, its samples) of every micro-batch of the last step on all ranks, the highest first. Collective; the same on all ranks."""
        batches, results = self._last
        mine = [(tuple(sorted(_samples([b]))), *r["loss"].tolist()) for b, r in zip(batches, results, strict=False)]
        sums: dict[tuple[int, ...], tuple[float, float]] = {}
        for samples, total, count in state.from_all_ranks(mine):  # tensor-parallel ranks say the same, context-parallel ones a part each
            before = sums.get(samples, (0.0, 0.0))
            sums[samples] = (before[0] + total, before[1] + count)
        return sorted(((total / count, samples) for samples, (total, count) in sums.items() if count), reverse=True)

    def _counted(self, loss_fn: LossFn) -> LossFn:
        def counted(output: torch.Tensor, batch: MicroBatch):
            total, count, partials = loss_fn(output, batch)
            self._count += count.detach()
            return total, count, partials

        return counted

    def _finalize(self, chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None, **rest: Any) -> None:
        """Megatron's count is an integer, and weights of samples need not be."""
        finalize_model_grads(chunks, None if num_tokens is None else self._count, **rest)

    def tensors(self, kind: str) -> list[torch.Tensor]:
        if kind == "gradients":
            return [b.grad_data for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        if kind != "optimizer":
            return super().tensors(kind)
        weights = {t.untyped_storage()._cdata for t in super().tensors("weights")}
        held = [part.optimizer for part in self.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
        states = [x for o in held for s in o.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
        # in fp32 what is optimized are views of the weights themselves
        masters = [p.data for o in held for group in o.param_groups for p in group["params"]]
        return [t for t in (*states, *masters) if t.untyped_storage()._cdata not in weights]

    def _noise(self, batch: MicroBatch) -> torch.Tensor:
        return neftune.noise(batch, hidden_size=self.spec.hidden_size, alpha=self.neftune_alpha, seed=self.seed, step=self.steps_done)

    def _apply(self, grad_norm: float) -> None:
        """Clip and step, as ChainedOptimizer.step does after the norm."""
        for part in self.optimizer.chained_optimizers:
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        self._to_gather = self._gathers

    def _nonfinite(self, micro_batches: list[MicroBatch], results: list[Partials], found: dict[str, float]) -> None:
        """Collective. Says which samples had such a loss, or, where all losses are finite, which were in the step; stops, or counts."""
        mine = [b for b, r in zip(micro_batches, results, strict=False) if not bool(torch.isfinite(r["loss"]).all())]
        culprits = state.from_all_ranks(_samples(mine))
        where = f"in the loss of sample(s) {_shorten(culprits)}" if culprits else (
            f"in the gradient, no loss is: sample(s) {_shorten(state.from_all_ranks(_samples(micro_batches)))}"
        )  # fmt: skip
        what = f"not finite {where}; loss {found['loss']}, gradient norm {found['grad_norm']}"
        self.skipped_in_a_row += 1
        if self.on_nonfinite == "stop":
            raise FloatingPointError(f"{what}: stopped, parameters untouched; the last checkpoint is whole (train.on_nonfinite)")
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(f"{what}: the {MAX_SKIPPED}th step in a row to be skipped; the last checkpoint is whole")
        if state.is_main():
            log.info(f"step skipped: {what}")

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def part(self, name: str = "", *, with_optimizer: bool = True) -> Part:
        self._settle()
        return Part(name, self.modules, self.optimizer if with_optimizer else None, self.head, self.source.hf_dir, self.groups)

    @state.in_own_groups
    def resume(self, directory: Any, steps_done: int, scheduled: int) -> None:
        """Weights, optimizer state and schedule as after `steps_done` steps of this trainer; `scheduled`: where its schedule stood."""
        load_optimizer(directory, self.modules, self.optimizer)
        self.scheduler.step(increment=scheduled)
        self.steps_done = steps_done
