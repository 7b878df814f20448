"""Whether vLLM computes from the weights that were written into it.

A kernel may keep weights in an order of its own, in tensors of the same name and shape. A write in place would then be
another model's. So the first write is followed by the products of a few vectors through vLLM's layers, which must be
those of the written weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mrlhf.errors import EnvironmentProblem
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel import state

_TOKENS = 4
# difference over norm: bfloat16 gives 0.005, fp8 weights and inputs 0.04, weights in another order 1 and more
_TOLERANCE = 0.2
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class FirstWrite:
    """layers: linear layers and head by name, whose plain weights are written. config: vLLM's."""

    def __init__(self, layers: dict[str, Any], spec: ModelSpec, config: Any) -> None:
        self.layers, self.spec, self.config = layers, spec, config
        self.rows: dict[str, int] = {}  # of a weight that are written; a vocabulary's padding is not
        self._experts: list[tuple[Any, torch.Tensor]] = []
        self._differing: set[str] = set()

    def _compare(self, name: str, computed: torch.Tensor, expected: torch.Tensor) -> None:
        difference = float((computed.float() - expected.float()).norm() / expected.float().norm())
        if not difference <= _TOLERANCE:
            self._differing.add(f"{name} (by {difference:.2g} of its norm)")

    @torch.no_grad()
    def converted(self, name: str, layer: Any, weight: torch.Tensor) -> None:
        """vLLM has converted this plain weight."""
        from vllm.config import set_current_vllm_config

        x = _probe(weight)
        with set_current_vllm_config(self.config):
            self._compare(name, layer.quant_method.apply(layer, x), F.linear(x, weight))

    @torch.no_grad()
    def before_packing(self, experts: list[Any]) -> None:
        """Computes the experts by hand while their weights have the order in which they were written."""
        self._experts = [(layer, _by_hand(layer, self.spec)) for layer in experts if self.spec.gated]

    @torch.no_grad()
    def verify(self) -> None:
        """Collective. Raises EnvironmentProblem on all ranks."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.config):
            for name, layer in self.layers.items():
                x, rows = _probe(layer.weight), self.rows.get(f"{name}.weight")
                computed, expected = layer.quant_method.apply(layer, x), F.linear(x, layer.weight)
                self._compare(f"{name}.weight", computed[:, :rows], expected[:, :rows])
            for i, (layer, expected) in enumerate(self._experts):
                self._compare(f"experts of MoE layer {i}", _by_vllm(layer, self.spec), expected)
        if names := sorted(set(state.from_all_ranks(list(self._differing)))):
            what = f"vLLM's kernels do not compute from the weights that were written into it: {', '.join(names[:4])}"
            raise EnvironmentProblem(what, where=f"{len(names)} layers", expected="kernels that keep a weight's order")


def _probe(weight: torch.Tensor) -> torch.Tensor:
    """Inputs of a layer, without a use of the global random state."""
    x = torch.randn(_TOKENS, weight.size(-1), generator=torch.Generator().manual_seed(1))
    return x.to(weight.device, weight.dtype)


def _choices(spec: ModelSpec) -> torch.Tensor:
    """The experts of each token."""
    assert spec.experts is not None
    return (torch.arange(_TOKENS * spec.experts.top_k) % spec.experts.num).view(_TOKENS, -1)


def _by_hand(layer: Any, spec: ModelSpec) -> torch.Tensor:
    """The mean of each token's experts."""
    outputs = []
    for x, chosen in zip(_probe(layer.w13_weight), _choices(spec).tolist(), strict=True):
        halves = [F.linear(x, layer.w13_weight[e]).chunk(2) for e in chosen]
        hidden = [_ACTIVATIONS[spec.activation](gate) * up for gate, up in halves]
        outputs.append(torch.stack([F.linear(h, layer.w2_weight[e]) for h, e in zip(hidden, chosen, strict=True)]))
    return torch.stack(outputs).mean(1)


def _by_vllm(layer: Any, spec: ModelSpec) -> torch.Tensor:
    x = _probe(layer.w13_weight)
    chosen = _choices(spec).int().to(x.device)
    weights = torch.full(chosen.shape, 1 / chosen.size(1), device=x.device)
    return layer.quant_method.apply(layer=layer, x=x, topk_weights=weights, topk_ids=chosen, shared_experts=None,
                                    shared_experts_input=None)
