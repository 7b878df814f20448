"""The weights in a live vLLM: parameters that are written in place, and linear layers whose weight vLLM converts.

Converted forms are fp8, quantized by vLLM as it loads a model, and on CPU oneDNN's packing. Such a layer gets the plain
weight of this rank's shard and converts it as it does when a model is loaded; the result is copied into the old one's
memory, whose addresses CUDA graphs hold.
"""

from __future__ import annotations

from typing import Any

import torch

from mrlhf.errors import ConfigError, EnvironmentProblem
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import ModelSpec
from mrlhf.parallel import device
from mrlhf.rl.rollout.vllm_first_write import FirstWrite


def keep_linear_weights() -> None:
    """On CPU: linear layers keep their plain weight (vLLM's own fallback), which can be written in place as on CUDA."""
    import vllm.model_executor.layers.utils as layer_utils

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layer_utils.dispatch_cpu_unquantized_gemm = keep


def check_weights(spec: ModelSpec, weights: str, *, dtype: str, placement: str = "colocated") -> list[ConfigError]:
    """Contradictions of `rollout.weights` with `rollout.placement` and the model's spec and dtype."""
    errors, key = [], "rollout.weights"
    if weights != "plain" and placement == "separate":
        what = f"{key} = {weights}: weights are written in place on generating ranks"
        errors.append(ConfigError(what, where=key, expected="plain", fix=f"--{key} plain"))
    if weights == "packed" and device.current().is_cuda:
        errors.append(ConfigError(f"{key} = packed is for vLLM's CPU kernels", where=key, expected="plain or fp8",
                                  fix=f"--{key} plain"))
    if weights == "fp8" and dtype != "bfloat16":
        what = f"{key} = fp8: vLLM quantizes bfloat16 weights, and model.dtype = {dtype}"
        errors.append(ConfigError(what, where=key, expected="plain", fix="--model.dtype bfloat16"))
    if weights == "fp8" and spec.experts is not None:
        what = f"{key} = fp8: not yet run with vLLM's kernels for experts"
        errors.append(ConfigError(what, where=key, expected="plain, or a model without experts",
                                  fix=f"--{key} plain"))
    return errors


class VLLMWeights:
    """parameters: tensors written in place, by vLLM's names; stacked experts [e, ...] as one view each,
    `...experts.{e}.w13_weight`.

    made: name -> [out, in], the shape of the plain weight that `convert` takes for it.
    """

    def __init__(self, llm: Any, spec: ModelSpec, *, packed: bool = False) -> None:
        """Raises EnvironmentProblem if vLLM has chosen a kernel that stores experts in an order of its own."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        self._config = llm.llm_engine.vllm_config
        self._layers = {
            f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, LinearBase)
            and (not layer.weight.numel() or not isinstance(layer.quant_method, UnquantizedLinearMethod))
        }
        # vLLM keeps the shapes that a checkpoint's weights have
        plain = {name: get_layerwise_info(layer).restore_metadata[0]["weight"] for name, layer in self._layers.items()}
        self.made = {name: tuple(weight.shape) for name, weight in plain.items()}
        converted = {name.removesuffix("weight") for name in self.made}
        self.parameters: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            prefix, _, kind = name.rpartition(".")
            if kind in ("w13_weight", "w2_weight"):
                prefix = prefix.removesuffix(".routed_experts")
                self.parameters |= {f"{prefix}.{e}.{kind}": one for e, one in enumerate(parameter.data)}
            elif f"{prefix}." not in converted or kind == "bias":
                self.parameters[name] = parameter.data
        if spec.tied:
            self.parameters.pop("lm_head.weight", None)
        self._experts = _expert_layers(model)
        plain = {name: m for name, m in model.named_modules() if f"{name}.weight" in self.parameters
                 and isinstance(m, (LinearBase, ParallelLMHead))}
        self.first: FirstWrite | None = FirstWrite(plain, spec, self._config)
        heads = [
            m for name, m in model.named_modules()
            if isinstance(m, VocabParallelEmbedding) and (spec.tied or name.endswith("lm_head"))
        ]
        self._packed_heads = heads if packed else []

    def misfits(self, expected: dict[str, list[TensorSlice]]) -> list[str]:
        """Names of parameters that vLLM's weight map lacks or has too many, or whose shapes differ from it."""
        names = sorted((set(self.parameters) | set(self.made)) ^ set(expected))
        for name, blocks in expected.items():
            if name in self.parameters:
                if self.first is not None and blocks[0].dim == 0:
                    self.first.rows[name] = max(b.offset + b.length for b in blocks)
                wrong = any(b.offset + b.length > self.parameters[name].size(b.dim) for b in blocks)
            else:  # the blocks must cover it: its memory is new each time
                wrong = name in self.made and sum(b.length for b in blocks) != self.made[name][blocks[0].dim]
            names += [name] if wrong else []
        return names

    def convert(self, name: str, weight: torch.Tensor) -> None:
        """Converts a plain weight of the shape made[name]. Collective in a replica if the layer's scales are."""
        from vllm.config import set_current_vllm_config

        layer = self._layers[name]
        kept = {k: x for k, x in (*layer.named_parameters(recurse=False), *vars(layer).items())
                if isinstance(x, torch.Tensor)}
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer._already_called_process_weights_after_loading = False
        with set_current_vllm_config(self._config):
            layer.quant_method.process_weights_after_loading(layer)
        for parameter, old in kept.items():
            new = getattr(layer, parameter)
            if new is not old:
                same_form = new.shape == old.shape and new.stride() == old.stride()
                assert same_form, f"{name}: vLLM's converted weight has another layout than before"
                old.data.copy_(new)
                setattr(layer, parameter, old)
        if self.first is not None:
            self.first.converted(name, layer, weight)

    def finish_write(self) -> None:
        """After `parameters` have been written: updates the packed or reordered copies of vLLM's CPU kernels.

        The first time it is collective, and raises EnvironmentProblem if vLLM computes from other weights.
        """
        first, self.first = self.first, None
        if first is not None:
            first.before_packing(self._experts)
        for layer in self._experts:
            _pack_experts(layer)
        for head in self._packed_heads:  # the plain weight stays, but the product reads a packed copy
            head.quant_method.process_weights_after_loading(head)
        if first is not None:
            first.verify()


def _expert_layers(model: torch.nn.Module) -> list[Any]:
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "w13_weight")]
    for layer in layers:
        backend = layer.quant_method.unquantized_backend.name
        if device.current().is_cuda and "TRITON" not in backend:
            what = f"vLLM chose {backend} for the experts, whose weights cannot be written in place"
            raise EnvironmentProblem(what, expected="its Triton kernel")
    return layers


def _pack_experts(layer: Any) -> None:
    """On CPU vLLM's kernel reads the plain weights, just written, in another order of the same size."""
    if not device.current().is_cuda:
        from vllm._custom_ops import cpu_prepack_moe_weight

        isa = layer.quant_method.moe_kernel.fused_experts.isa
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data.copy_(cpu_prepack_moe_weight(weight.data, isa))
