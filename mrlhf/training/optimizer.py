"""What Megatron's optimizer is made of: the settings from `optim.*`, the learning-rate schedule, and Adam."""

from __future__ import annotations

from typing import Any

import torch

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import, which comes next)

# isort: split
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from mrlhf.config.options import OptimConfig


def make_optimizer(chunks: list[Any], optim: OptimConfig, groups: ProcessGroupCollection, *, dtype: torch.dtype,
                   overlap_gather: bool) -> MegatronOptimizer:
    """chunks: the model's parts, each in Megatron's DistributedDataParallel."""
    config = OptimizerConfig(optimizer="adam", lr=optim.lr, min_lr=optim.min_lr, weight_decay=optim.weight_decay,
                             adam_beta1=optim.adam_beta1, adam_beta2=optim.adam_beta2, adam_eps=optim.adam_eps,
                             clip_grad=optim.clip_grad, use_distributed_optimizer=optim.use_distributed_optimizer,
                             overlap_param_gather=overlap_gather, bf16=dtype == torch.bfloat16, params_dtype=dtype)
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=groups)


def make_scheduler(optimizer: Any, optim: OptimConfig, *, total_steps: int) -> OptimizerParamScheduler:
    """Advanced by 1 before each step: step k of N has lr(k). min_lr would come at N + 1, so no step has lr 0.

    A warm-up longer than the run has the slope that it would have in a long one.
    """
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=optim.lr, min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_steps, lr_decay_steps=max(total_steps, optim.lr_warmup_steps) + 1,
        lr_decay_style=optim.lr_decay_style, start_wd=optim.weight_decay, end_wd=optim.weight_decay,
        wd_incr_steps=total_steps + 1, wd_incr_style="constant",
        wsd_decay_steps=optim.lr_wsd_decay_steps or None, lr_wsd_decay_style="linear",
    )


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with the contract of TE's and apex's FusedAdam, on torch's fused kernel.

    `step` lives in the parameter group; a parameter's state is exp_avg and exp_avg_sq. parallel/megatron.py says why
    Megatron needs it.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, adam_w_mode: bool = True, **_: Any):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            step = torch.full((), float(group["step"]), device=params[0].device)
            kernel(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],  # AMSGrad's maxima
                [step] * len(params),
                amsgrad=False,
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )
