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
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from mrlhf.errors import EnvironmentProblem
from mrlhf.parallel import cpu_torch, device

VERSION = "0.16.1"
Shape = tuple[int, int, int]


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


def renew_gather_buffer() -> None:
    """Scratch memory of sequence parallelism's all-gathers; otherwise initialize_model_parallel makes it."""
    from megatron.core import parallel_state

    parallel_state._GLOBAL_MEMORY_BUFFER = None
    parallel_state._set_global_memory_buffer()


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
    # A save of Megatron's own needs no process-safe queue here. It would spawn a Manager process for it, 4-10 s.
    filesystem_async._results_queue = queue.Queue()
    _mend_experts()
    # The layer knows MLP classes by name, and our MoE, a subclass, gets its groups in its spec.
    _drop_log_lines("megatron.core.transformer.transformer_layer", "Unknown MLP type")


def _mend_experts() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Without Transformer Engine the module never defines te_general_gemm, and the router reads it.
    if not hasattr(moe_utils, "te_general_gemm"):
        vars(moe_utils)["te_general_gemm"] = None
    permute = _permuted(moe_utils.permute)
    for module in (moe_utils, token_dispatcher):
        vars(module)["permute"] = permute


def _permuted(real: Callable[..., Any]) -> Callable[..., Any]:
    """`permute` of moe_utils: Megatron's own selects by a mask, for whose count the host waits twice in each layer,
    though it knows the count.
    """

    def permute(tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor | None = None,
                num_out_tokens: int | None = None, fused: bool = False, drop_and_pad: bool = False) -> Any:
        if fused or drop_and_pad or probs is None or not isinstance(num_out_tokens, int):
            return real(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
        chosen = routing_map.T.flatten().nonzero_static(size=num_out_tokens).squeeze(1)  # by expert, then by token
        places = chosen % tokens.size(0)
        return tokens.index_select(0, places), probs.T.flatten().index_select(0, chosen), places

    return permute


def _drop_log_lines(logger: str, text: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())


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

        patched["maybe_move_tensor_to_cpu"] = maybe_move_tensor_to_cpu
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


def norm_on_device() -> None:
    """Without TE and apex Megatron's norm makes the host wait for every gradient, and its scaling copies each one."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def norm(chunk_size: int, noop: Any, lists: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
        return torch.stack(torch._foreach_norm(lists[0])).norm().reshape(1), None

    def scale(chunk_size: int, noop: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
        torch._foreach_mul_(lists[1], factor)  # Megatron passes the gradients twice

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        vars(clip_grads).update(l2_norm_impl=norm, multi_tensor_scale_impl=scale)


def replace_output(model: Any, output: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A last stage returns `output(hidden states [s, b, h])`; its own `_postprocess` would make logits."""
    model._postprocess = lambda hidden_states, **_: output(hidden_states)


def know_shapes(communicator: Any, shapes: Sequence[Shape]) -> None:
    """Gives a communicator between pipeline stages the shapes that Megatron would exchange before each tensor, with two
    waits of the host. shapes: of the hidden states of every micro-batch.

    A rank receives in the order of its passes. The k-th backward pass takes the same micro-batch as the k-th forward
    pass, and the chunks from the last to the first.
    """
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    config, rank, last = communicator.config, communicator.pp_group.rank(), communicator.pp_group.size() - 1
    chunks, together = config.virtual_pipeline_model_parallel_size or 1, config.microbatch_group_size_per_vp_stage
    order = get_schedule_table(len(shapes), chunks, together)
    forward = iter([shapes[number] for number, chunk in order if chunk > 0 or rank > 0])
    backward = iter([shapes[number] for number, chunk in order if chunk > 0 or rank < last])

    def shapes_to_receive(send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        return next(forward) if recv_prev else None, next(backward) if recv_next else None

    communicator._communicate_shapes = shapes_to_receive


def is_distributed(optimizer: Any) -> bool:
    """Whether one of Megatron's optimizers is the distributed one, whose state lies over the data-parallel ranks."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(optimizer, DistributedOptimizer)


def optimizer_slices(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, int, int, dict[str, torch.Tensor]]]:
    """(parameter, start, end, {kind: its flat values [start, end)}) that this rank of a distributed optimizer holds.

    kind: param (the master weight), exp_avg, exp_avg_sq. Megatron's own state dict of this form, of which each rank
    writes its slices (fully_sharded_model_space), was given up; what is left gathers the state on every rank.
    """
    for by_dtype in optimizer.gbuf_ranges:
        for bucket in chain.from_iterable(by_dtype.values()):
            for parameter, ranges in bucket["param_map"].items():
                values = optimizer._get_main_param_and_optimizer_states(parameter)
                yield parameter, ranges["param"].start, ranges["param"].end, values
