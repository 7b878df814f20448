"""One optimizer step: micro-batches -> Megatron's schedule -> clip -> step. Also forward passes without gradient.

A stage passes micro-batches and a loss function `loss(output, batch) -> (sum, count, partials)`:
  sum       fp32 scalar with gradient, over this micro-batch's trained tokens (or pairs, or answers)
  count     the number of those tokens (or pairs, or answers)
  partials  {metric: tensor [sum, count]} (observe/metrics.py)
Normalisation happens once: Megatron adds gradients over micro-batches and data-parallel ranks without scaling
(calculate_per_token_loss) and `finalize_model_grads` divides them by the step's global count. So neither
the micro-batch size nor the number of ranks changes a result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from mrlhf.checkpoint.optimizer_state import load_optimizer
from mrlhf.checkpoint.save import Part
from mrlhf.checkpoint.source import ModelSource, load_weights
from mrlhf.config.options import OptimConfig, ParallelConfig
from mrlhf.data.loader import Loader, MicroBatch
from mrlhf.errors import NotFinite
from mrlhf.models import gpt
from mrlhf.models.layers import neftune
from mrlhf.models.layers.logprobs import Head, TargetLogProbs, head_logprobs
from mrlhf.models.layers.router import Router
from mrlhf.models.layers.router_losses import Balance, Balancer, StepBalance, token_samples
from mrlhf.observe import metrics
from mrlhf.parallel import device, megatron, state
from mrlhf.parallel.context import gather_tokens
from mrlhf.training.optimizer import FusedAdam, make_optimizer, make_scheduler

log = logging.getLogger(__name__)
Partials = dict[str, torch.Tensor]
LossFn = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, Partials]]
MAX_SKIPPED = 10  # steps in a row; by then single samples are not the cause
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _sample_indices(micro_batches: list[MicroBatch]) -> list[int]:
    """Indices in the data set of all samples, without fillers."""
    return [index for b in micro_batches for index in b.index_N[b.weights_N != 0].tolist()]


def _shortened(indices: list[int], most: int = 20) -> str:
    unique = sorted(set(indices))
    return ", ".join(map(str, unique[:most])) + (f" and {len(unique) - most} more" if len(unique) > most else "")


class Model:
    """This rank's part of a GPT model (its virtual stages, in an interleaved pipeline), for forward passes: reference,
    reward model, scoring.

    groups: the process groups of `parallel`, by default those of the run.
    """

    def __init__(self, source: ModelSource, parallel: ParallelConfig, *, head: str, dtype: str, seed: int,
                 random_init: bool = False, groups: state.Groups | None = None) -> None:
        self.source, self.spec, self.head, self.dtype = source, source.spec, head, dtype
        self.groups = groups or state.groups()
        self.collection = self.groups.collection
        self.config = gpt.transformer_config(self.spec, parallel, dtype=DTYPES[dtype])
        virtual = parallel.interleaved_chunks
        self.modules = [
            gpt.build_model(self.spec, self.config, head=head, vp_stage=stage, groups=self.groups)
            for stage in ([None] if virtual is None else range(virtual))
        ]
        if random_init:
            for module in self.modules:
                gpt.fill(module, self.spec, gpt.RandomSource(self.spec, head=head, seed=seed), head=head)
        else:
            load_weights(source, self.modules, head=head, seed=seed)
        self.chunks: list[torch.nn.Module] = list(self.modules)  # what the schedule runs: a trainer wraps them
        self.is_last_stage = self.groups.is_last_stage
        self.device = device.current().name

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters, by Megatron's name with the global layer index."""
        return {name: p.data for module in self.modules for name, p in gpt.local_parameters(module)}

    def tensors(self, kind: str) -> list[torch.Tensor]:
        """All tensors of a kind: "weights"; of a trainer also "optimizer" (moments, fp32 weights) and "gradients"."""
        assert kind == "weights", kind
        return [p.data for module in self.modules for p in (*module.parameters(), *module.buffers())]

    def logprobs(self, hidden_BTH: torch.Tensor, batch: MicroBatch, *, temperature: float = 1.0,
                 with_entropy: bool = False, keep_BT: torch.Tensor | None = None) -> TargetLogProbs:
        """Log-probs of the batch's targets from an LM's output, fields [B, T]; see `head_logprobs`."""
        return head_logprobs(hidden_BTH, batch.targets_BT, self._head(), temperature=temperature,
                             with_entropy=with_entropy, keep=keep_BT)

    def _head(self) -> Head:
        return gpt.lm_head(self.modules[-1], self.spec)

    def _schedule(
        self, micro_batches: list[MicroBatch], step: Callable, *, forward_only: bool, collect: bool = False
    ) -> list:
        iterators = [iter(micro_batches) for _ in self.chunks]
        pp = self.collection.pp
        return get_forward_backward_func(pp.size(), self.config.virtual_pipeline_model_parallel_size)(
            forward_step_func=step, data_iterator=iterators if len(iterators) > 1 else iterators[0], model=self.chunks,
            num_microbatches=len(micro_batches), seq_length=micro_batches[0].tokens_BT.size(1),
            micro_batch_size=micro_batches[0].tokens_BT.size(0), forward_only=forward_only,
            collect_non_loss_data=collect, p2p_communicator=P2PCommunicator(pp, self.config),
            pg_collection=self.collection,
        )

    @torch.no_grad()
    def forward(self, micro_batches: list[MicroBatch], fn: Callable[[torch.Tensor, MicroBatch], torch.Tensor], *,
                channels: int) -> list[torch.Tensor]:
        """`fn(output, batch)` -> fp32 [channels, B, T] of every micro-batch, on every pipeline stage, without gradient.

        Under context parallelism `fn` sees this rank's tokens; the returned rows are whole.
        """
        self._set_training(False)
        cp, pp = self.collection.cp, self.collection.pp

        def step(iterator, model):
            batch = gpt.local_part(next(iterator).to(self.device), cp)
            return gpt.forward(model, batch), lambda output, non_loss_data=False: gather_tokens(fn(output, batch), cp)

        outputs = self._schedule(micro_batches, step, forward_only=True, collect=True)
        self._set_training(True)
        if not self.is_last_stage:
            outputs = [torch.empty(channels, *b.tokens_BT.shape, device=self.device) for b in micro_batches]
        for output in outputs if pp.size() > 1 else ():
            dist.broadcast(output, group=pp, group_src=pp.size() - 1)
        return outputs

    def _set_training(self, on: bool) -> None:
        for chunk in self.chunks:
            chunk.train(on)

    def _loss_step(self, loss_fn: LossFn, noise: Callable[[MicroBatch], torch.Tensor] | None = None,
                   balance: StepBalance | None = None) -> Callable:
        """The schedule's forward step. noise: embedding noise of a whole micro-batch."""

        def step(iterator, model):
            given = next(iterator)
            whole = given.to(self.device)
            batch = gpt.local_part(whole, self.collection.cp)

            def loss(output):
                total, count, partials = loss_fn(output, batch)
                # a copy for the log, since Megatron's schedule divides `total` in place
                logged = torch.stack([total.detach(), count.detach().float()])
                return total, count.to(torch.int), {**partials, "loss": logged}

            samples_BT = None if balance is None else token_samples(batch)
            added = None if noise is None else partial(noise, given)
            return gpt.forward(model, batch, noise=added, samples_BT=samples_BT), loss

        return step

    def _reduce(self, results: list[Partials]) -> Partials:
        """Collective. Partials summed over micro-batches, data- and context-parallel ranks, on every rank."""
        partials = metrics.all_reduce(metrics.merge(results), self.collection.dp_cp) if self.is_last_stage else {}
        return state.from_last_stage({k: v.cpu() for k, v in partials.items()}, self.collection.pp)

    @torch.no_grad()
    def evaluate(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> Partials:
        """Collective. The loss function without gradient; partials as `step` reduces them."""
        self._set_training(False)
        results = self._schedule(micro_batches, self._loss_step(loss_fn), forward_only=True)
        self._set_training(True)
        return self._reduce(results)


class Trainer(Model):
    """A model with gradients, optimizer and learning-rate schedule."""

    def __init__(
        self, source: ModelSource, parallel: ParallelConfig, optim: OptimConfig, *, head: str, dtype: str, seed: int,
        total_steps: int, random_init: bool = False, on_nonfinite: str = "stop", neftune_alpha: float = 0.0,
        balance: Balance | None = None, groups: state.Groups | None = None,
    ) -> None:
        self.on_nonfinite, self.skipped_in_a_row = on_nonfinite, 0
        self.neftune_alpha, self.seed, self.steps_done = neftune_alpha, seed, 0
        super().__init__(source, parallel, head=head, dtype=dtype, seed=seed, random_init=random_init, groups=groups)
        self.balance = self._balancers(balance) if balance is not None else None
        self.adam = megatron.install_adam(FusedAdam)
        reduces, gathers = self._overlaps(parallel, optim)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=optim.use_distributed_optimizer,
                                            grad_reduce_in_fp32=True, overlap_grad_reduce=reduces or gathers,
                                            overlap_param_gather=gathers)
        wrap = partial(DistributedDataParallel, self.config, ddp, pg_collection=self.collection)
        self.chunks = [wrap(module) for module in self.modules]
        self._overlaps_gather, self._gather_pending = gathers, False
        if reduces or gathers:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.config.finalize_model_grads_func = self._finalize_grads
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)  # this rank's, over the step
        options = {"dtype": DTYPES[dtype], "overlap_gather": gathers}
        self.optimizer = make_optimizer(self.chunks, optim, self.collection, **options)
        self.scheduler = make_scheduler(self.optimizer, optim, total_steps=total_steps)

    def _overlaps(self, parallel: ParallelConfig, optim: OptimConfig) -> tuple[bool, bool]:
        """(overlap the reduction of gradients with backward, overlap the all-gather of parameters with forward)."""
        if self.collection.dp_cp.size() == 1:
            return False, False
        options = (parallel.overlap_grad_reduce, parallel.overlap_param_gather)
        reduces, gathers = (device.current().is_cuda if option is None else option for option in options)
        return reduces, gathers and optim.use_distributed_optimizer

    def _finish_param_gather(self) -> None:
        """Collective. All-gathers the new parameters now, where the next forward pass would have done it."""
        if self._gather_pending:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._gather_pending = False

    def parameters(self) -> dict[str, torch.Tensor]:
        self._finish_param_gather()
        return super().parameters()

    def _head(self) -> Head:
        """No forward hook waits for the head's weight, because it is used outside of its module."""
        head = super()._head()
        if self._overlaps_gather:
            self.chunks[-1].param_to_bucket_group[head.weight_WH].finish_param_sync()
        return head

    def _balancers(self, balance: Balance) -> StepBalance:
        balancers = []
        for router in (m for module in self.modules for m in module.modules() if isinstance(m, Router)):
            router.balancer = Balancer(balance)
            balancers.append(router.balancer)
        layers = sum(layer.moe for layer in self.spec.layers)
        return StepBalance(balance, balancers, layers=layers, dp_cp=self.collection.dp_cp)

    def step(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        """Collective. One optimizer step. Returns the reduced metrics with `loss`, `grad_norm` (before clipping) and
        `lr`; with on_nonfinite "skip" also `skipped`; with auxiliary losses of routers `moe_aux_loss` and `moe_z_loss`,
        which `loss` does not contain.

        A loss or gradient norm that is not finite on any rank leaves parameters and optimizer state of all ranks as
        they were. Raises NotFinite then, naming the samples; with "skip" only for the last of MAX_SKIPPED
        steps in a row.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        noise = self._noise if self.neftune_alpha else None
        if self.balance is not None:
            self.balance.start_step(gpt.local_part(b.to(self.device), self.collection.cp) for b in micro_batches)
        self._count.zero_()
        forward_step = self._loss_step(self._counting(loss_fn), noise, self.balance)
        results = self._schedule(micro_batches, forward_step, forward_only=False)
        self._last = (micro_batches, results)
        self.steps_done += 1
        self.scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        reduced = self._reduce(results)
        values = metrics.finalize(reduced)
        if self.balance is not None:
            values |= self.balance.finish_step(float(reduced["loss"][1]))
        values["grad_norm"], values["lr"] = grad_norm, self.lr
        if state.on_any_rank(not (math.isfinite(values["loss"]) and math.isfinite(grad_norm))):
            self._reject_step(micro_batches, results, values)
        else:
            self._clip_and_step(grad_norm)
            self.skipped_in_a_row = 0
        if self.on_nonfinite == "skip":
            values["skipped"] = float(self.skipped_in_a_row > 0)
        return values

    def micro_batch_losses(self) -> list[tuple[float, tuple[int, ...]]]:
        """Collective. (mean loss, its samples) of every micro-batch of the last step on all ranks, the highest first.
        """
        mine = [(tuple(sorted(_sample_indices([b]))), *r["loss"].tolist()) for b, r in zip(*self._last, strict=False)]
        sums: dict[tuple[int, ...], tuple[float, float]] = {}
        # a part from each context-parallel rank, equal ones from tensor-parallel ranks
        for samples, total, count in state.from_all_ranks(mine):
            before = sums.get(samples, (0.0, 0.0))
            sums[samples] = (before[0] + total, before[1] + count)
        return sorted(((total / count, samples) for samples, (total, count) in sums.items() if count), reverse=True)

    def _counting(self, loss_fn: LossFn) -> LossFn:
        def counting(output: torch.Tensor, batch: MicroBatch):
            total, count, partials = loss_fn(output, batch)
            self._count += count.detach()
            return total, count, partials

        return counting

    def _finalize_grads(self, chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None, **rest: Any) -> None:
        """Divides by our own count: Megatron's is an integer, and sample weights need not be."""
        finalize_model_grads(chunks, None if num_tokens is None else self._count, **rest)

    def tensors(self, kind: str) -> list[torch.Tensor]:
        if kind == "gradients":
            return [b.grad_data for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        if kind != "optimizer":
            return super().tensors(kind)
        weights = {t.untyped_storage()._cdata for t in super().tensors("weights")}
        parts = self.optimizer.chained_optimizers
        held = [part.optimizer for part in parts if not getattr(part, "is_stub_optimizer", False)]
        states = [x for o in held for s in o.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
        # in fp32 the optimizer's parameters are views of the weights themselves
        masters = [p.data for o in held for group in o.param_groups for p in group["params"]]
        return [t for t in (*states, *masters) if t.untyped_storage()._cdata not in weights]

    def _noise(self, batch: MicroBatch) -> torch.Tensor:
        h, alpha = self.spec.hidden_size, self.neftune_alpha
        return neftune.embedding_noise(batch, hidden_size=h, alpha=alpha, seed=self.seed, step=self.steps_done,
                                       device=self.device)

    def _clip_and_step(self, grad_norm: float) -> None:
        """What ChainedOptimizer.step does after it has the norm."""
        for part in self.optimizer.chained_optimizers:
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        self._gather_pending = self._overlaps_gather

    def _reject_step(self, micro_batches: list[MicroBatch], results: list[Partials], values: dict[str, float]) -> None:
        """Collective. Stops, or counts a skipped step. Names the samples at fault, or all if no loss is."""
        mine = [b for b, r in zip(micro_batches, results, strict=False) if not bool(torch.isfinite(r["loss"]).all())]
        if culprits := state.from_all_ranks(_sample_indices(mine)):
            where = f"in the loss of sample(s) {_shortened(culprits)}"
        else:
            everyone = state.from_all_ranks(_sample_indices(micro_batches))
            where = f"in the gradient, no loss is: sample(s) {_shortened(everyone)}"
        what = f"not finite {where}; loss {values['loss']}, gradient norm {values['grad_norm']}"
        self.skipped_in_a_row += 1
        fix = f"a lower learning rate (it was {self.lr:g}), a longer --optim.lr_warmup_steps, or mend these samples"
        if self.on_nonfinite == "skip" and self.skipped_in_a_row >= MAX_SKIPPED:
            raise NotFinite(f"{what}: the {MAX_SKIPPED}th step in a row to be skipped (train.on_nonfinite)", fix=fix)
        if self.on_nonfinite == "stop":
            skip = "; pretrain, sft, rm, dpo: --train.on_nonfinite skip leaves such steps out"
            raise NotFinite(f"{what}: the step is not taken (train.on_nonfinite)", fix=fix + skip)
        log.info(f"step skipped: {what}")

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def part(self, name: str = "", *, with_optimizer: bool = True) -> Part:
        """Collective. What a checkpoint saves of this model."""
        self._finish_param_gather()
        return Part(name, self.modules, self.optimizer if with_optimizer else None, self.head, self.source.hf_dir)

    def resume(self, directory: Any, steps_done: int, scheduled: int) -> None:
        """Collective. Loads the state after `steps_done` steps. scheduled: steps of the learning-rate schedule."""
        load_optimizer(directory, self.modules, self.optimizer)
        self.scheduler.step(increment=scheduled)
        self.steps_done = steps_done


def place_samples(out: torch.Tensor, batches: list[MicroBatch], values: list[torch.Tensor]) -> None:
    """Writes the values, [N] of every micro-batch, to the samples' indices in `out`, float64 [samples]; no fillers."""
    for batch, values_N in zip(batches, values, strict=True):
        real = batch.weights_N > 0
        out[batch.index_N[real]] = values_N[real].double()


def sample_values(loader: Loader, compute: Callable[[list[MicroBatch]], list[torch.Tensor]]) -> torch.Tensor:
    """float64 [samples] of the loader's data set, the same on all ranks. Collective.

    compute: the values [N] of every micro-batch, in the order of the batches.
    """
    out = torch.zeros(loader.dataset.num_samples, dtype=torch.float64)
    for rows in loader.in_order():
        batches = loader.micro_batches(rows)
        place_samples(out, batches, compute(batches))
    return state.sum_over_data_parallel(out)


def score_micro_batches(model: Model, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Scores [N] of every micro-batch: the head's value at the last real token of each sample."""
    values = model.forward(batches, lambda values_BT1, batch: values_BT1.squeeze(-1).float()[None], channels=1)
    return [batch.last(v_1BT[0].cpu()) for batch, v_1BT in zip(batches, values, strict=True)]
