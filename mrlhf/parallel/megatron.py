"""Private names of megatron-core, and changes to its modules, each with its reason. No other file of mrlhf has any.

Read in megatron-core 0.16.1. A port to another version reads this file against the new sources, then cpu_torch.py
(tests/parallel/test_megatron.py holds the other files to public names).

Process groups are passed as `ProcessGroupCollection` (parallel/state.py). Megatron's globals, parallel_state, are never
initialised: what still reads them fails at once instead of taking another model's groups. Readers on our way, and how
each is avoided:
  GPTModel.tie_embeddings_and_output_weights_state_dict   overridden (models/gpt.py `GPT`)
  GPTModel._preprocess, where it cuts `padding_mask`      not reached: models/gpt.py `forward` embeds by itself
  MoELayer, as TransformerLayer makes a subclass of it    gets its groups in its spec (models/layer_spec.py)
  MegatronModule.sharded_state_dict without `tp_group`    CoreAttention has one (models/layers/attention.py)
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import queue
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mrlhf.errors import EnvironmentProblem
from mrlhf.parallel import cpu_torch, device

VERSION = "0.16.1"


def check_version() -> None:
    """Raises EnvironmentProblem unless the installed megatron-core is the one that this file was made for."""
    fix = f"pip install megatron-core=={VERSION}"
    try:
        installed = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentProblem("megatron-core is not installed", fix=fix) from error
    if installed != VERSION:
        what = f"megatron-core {installed} is installed; mrlhf is made for {VERSION}"
        raise EnvironmentProblem(what, expected=VERSION, fix=fix)


@functools.lru_cache(maxsize=1)
def adapt() -> None:
    """Makes megatron.core importable on this machine; once, before its first import."""
    check_version()
    # "Transformer Engine and Apex are not installed", five times
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    if not device.current().is_cuda:
        cpu_torch.install(_patch_on_cpu)
    if device.current().backend != "nccl":
        real_compile = torch.compile
        # megatron.core.jit captures torch.compile at import; on CPU compiling would start a C++ compiler
        torch.compile = lambda f=None, **kwargs: f if f is not None else (lambda g: g)  # type: ignore[assignment]
        try:
            import megatron.core.jit  # noqa: F401
        finally:
            torch.compile = real_compile
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    renew_gather_buffer()
    # Our saves need no process-safe queue. Megatron would spawn a Manager process for it, 4-10 s in each run.
    filesystem_async._results_queue = queue.Queue()
    # The layer knows MLP classes by name, and our MoE, a subclass, gets its groups in its spec.
    _drop_log_lines("megatron.core.transformer.transformer_layer", "Unknown MLP type")


def _drop_log_lines(logger: str, text: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())


def renew_gather_buffer() -> None:
    """Scratch memory of sequence parallelism's all-gathers; otherwise initialize_model_parallel makes it."""
    from megatron.core import parallel_state

    parallel_state._GLOBAL_MEMORY_BUFFER = None
    parallel_state._set_global_memory_buffer()


def _patch_on_cpu(module: types.ModuleType, facade: cpu_torch.Facade) -> None:
    """Called after `module` of megatron.core has executed."""
    name, patched = module.__name__.removeprefix(f"{cpu_torch.PACKAGE}."), vars(module)
    if name == "tensor_parallel.random":
        # both call torch._C on CUDA generators
        patched.update(_get_cuda_rng_state=facade.cuda.get_rng_state, _set_cuda_rng_state=facade.cuda.set_rng_state)
        # On CPU the CPU generator is the generator: its change inside fork() is wanted.
        _drop_log_lines(module.__name__, "CPU RNG state changed")
    elif name == "transformer.moe.moe_utils":
        move = patched["maybe_move_tensor_to_cpu"]

        def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
            """all_to_all_single wants numbers as sizes; Megatron converts only tensors of a GPU."""
            is_cpu_tensor = isinstance(tensor, torch.Tensor)
            return tensor.numpy() if as_numpy and is_cpu_tensor else move(tensor, as_numpy, record_stream)

        # Without Transformer Engine the module never defines te_general_gemm, and the router reads it.
        patched.update(maybe_move_tensor_to_cpu=maybe_move_tensor_to_cpu, te_general_gemm=None)
    elif name == "dist_checkpointing.mapping":
        # exchange_utils.py calls it with the literal "cuda"
        init_data = module.ShardedTensor.init_data
        module.ShardedTensor.init_data = lambda self, device, *args, **kwargs: init_data(
            self, cpu_torch.cuda_to_cpu(device), *args, **kwargs
        )


def install_adam(fused: type[torch.optim.Optimizer]) -> str:
    """Puts `fused` where Megatron would take torch's AdamW, and returns the name of the Adam in use.

    Without TE and apex Megatron's distributed optimizer can save with torch's AdamW but not load: it wants one `step` a
    group, torch keeps one a parameter. The flags say that an Adam with apex's contract is there.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is not fused and not optimizer.USING_PYTORCH_OPTIMIZER:
        return "TE/apex fused"
    vars(optimizer).update(Adam=fused, USING_PYTORCH_OPTIMIZER=False)
    vars(distrib_optimizer).update(Adam=fused, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)
    return "torch fused"


def replace_output(model: Any, output: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A last stage returns `output(hidden states [s, b, h])`; its own `_postprocess` would make logits."""
    model._postprocess = lambda hidden_states, **_: output(hidden_states)


def with_checkpoint_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """Names of a state dict -> names in the checkpoint; Megatron's save strategy begins with this call."""
    from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys

    return _replace_state_dict_keys_with_sharded_keys(tensors, True)[0]
