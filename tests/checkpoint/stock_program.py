"""Megatron's own GPTModel and mrlhf's in one process, each reading the other's checkpoints; prints JSON. Alone.

usage: stock_program.py WORK_DIR DENSE_HF MOE_HF

Of each HF directory only config and tokenizer are used. WORK_DIR/NAME/stock is what Megatron-LM's --save would leave:
iter_0000007 and the tracker file, with `args` of a class that only Megatron-LM has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ITERATION = 7


def stock_model(spec: Any, *, seed: int) -> Any:
    """Megatron's model with its own layers; its vocabulary has the rows of --make-vocab-size-divisible-by 128."""
    import torch
    import torch.nn.functional as F
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    fused = ("bias_activation", "bias_dropout", "masked_softmax", "apply_rope", "gradient_accumulation")
    experts = {} if spec.experts is None else {
        "num_moe_experts": spec.experts.num, "moe_router_topk": spec.experts.top_k,
        "moe_ffn_hidden_size": spec.experts.ffn_hidden_size, "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": not spec.experts.renormalise,
    }  # fmt: skip
    config = TransformerConfig(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups, kv_channels=spec.head_dim, ffn_hidden_size=spec.ffn_hidden_size,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, add_qkv_bias=spec.qkv_bias,
        normalization="RMSNorm", layernorm_epsilon=spec.norm_eps, hidden_dropout=0.0, attention_dropout=0.0,
        qk_layernorm=spec.qk_norm == "head", use_cpu_initialization=True, **experts,
        **{f"{name}_fusion": False for name in fused},
    )  # fmt: skip
    layers = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        qk_layernorm=spec.qk_norm == "head",
        num_experts=None if spec.experts is None else spec.experts.num,
    )
    model = GPTModel(
        config,
        layers,
        vocab_size=-(-spec.vocab_size // 128) * 128,
        max_sequence_length=spec.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(spec.ropes[0].theta),
        share_embeddings_and_output_weights=spec.tied,
    )
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():  # norms too: equal ones would hide a norm in another's place
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (p.dim() == 1))
    return model.eval()


def stock_save(model: Any, directory: Path) -> None:
    from argparse import Namespace

    from megatron.core import dist_checkpointing
    from megatron.core.transformer.enums import AttnBackend

    target = directory / f"iter_{ITERATION:07d}"
    target.mkdir(parents=True)
    args = Namespace(tensor_model_parallel_size=1, attention_backend=AttnBackend.auto, rank=Unknown())
    state = {"model": model.sharded_state_dict(), "args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    dist_checkpointing.save(state, str(target), content_metadata={"singleton_local_shards": False})
    (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


class Unknown:
    """Stands for a class that is not installed where the checkpoint is read: to unpickle it is an error."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('common.pt was unpickled')",)


def stock_load(model: Any, directory: Path) -> dict[str, Any]:
    """What Megatron-LM's --load does, strict as by default. Returns what it reads of `args`."""
    from megatron.core import dist_checkpointing

    tracker = (directory / "latest_checkpointed_iteration.txt").read_text().strip()
    target = directory / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
    assert dist_checkpointing.check_is_distributed_checkpoint(str(target))
    common = dist_checkpointing.load_common_state_dict(str(target))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(target))
    model.load_state_dict(loaded["model"], strict=True)
    return {"iteration": common["iteration"], "version": common["checkpoint_version"], **vars(common["args"])}


def stock_logits(model: Any, tokens_1T: Any, vocab: int) -> Any:
    import torch

    t = tokens_1T.size(1)
    mask = torch.triu(torch.ones(1, 1, t, t, dtype=torch.bool), 1)
    with torch.no_grad():
        return model(tokens_1T, torch.arange(t)[None], mask)[0, :, :vocab]


def our_logits(model: Any, tokens_1T: Any) -> Any:
    import numpy as np
    import torch

    from mrlhf.data.loader import Sample, collate
    from mrlhf.models import gpt

    tokens = tokens_1T[0].numpy().astype(np.int32)
    batch = collate([Sample(tokens, np.ones(len(tokens), np.uint8), 0)], packing=True)
    with torch.no_grad():
        hidden = gpt.forward(model.modules[0], batch)
        return gpt.lm_head(model.modules[0], model.spec).logits(hidden)[0, : len(tokens), : model.spec.vocab_size]


def compare(name: str, hf: Path, work: Path) -> dict[str, Any]:
    import shutil

    import torch
    from checkpoint_program import save

    from mrlhf.checkpoint.source import open_source
    from mrlhf.config.options import ParallelConfig
    from mrlhf.convert.hf import megatron_to_hf
    from mrlhf.errors import CheckpointError
    from mrlhf.models.families import spec_from_hf
    from mrlhf.models.families.spec import read_hf_config
    from mrlhf.training.trainer import Model

    spec = spec_from_hf(read_hf_config(hf), where=str(hf))
    tokens_1T = torch.arange(3, 40)[None] * 7 % spec.vocab_size
    theirs, stock = stock_model(spec, seed=5), work / name / "stock"
    stock_save(theirs, stock)
    wanted = stock_logits(theirs, tokens_1T, spec.vocab_size)
    result: dict[str, Any] = {"largest": float(wanted.abs().max())}
    try:
        open_source(str(stock))
    except CheckpointError as error:
        result["without config"] = str(error)
    shutil.copytree(hf, stock / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    for path in (stock, stock / f"iter_{ITERATION:07d}"):
        model = Model(open_source(str(path)), ParallelConfig(), head="lm", dtype="float32", seed=1)
        result[f"theirs read by us, {path.name}"] = float((our_logits(model, tokens_1T) - wanted).abs().max())
    megatron_to_hf(str(stock), work / name / "hf")
    exported = Model(open_source(str(work / name / "hf")), ParallelConfig(), head="lm", dtype="float32", seed=1)
    result["theirs exported to HF"] = float((our_logits(exported, tokens_1T) - wanted).abs().max())

    from mrlhf.config.options import OptimConfig
    from mrlhf.training.trainer import Trainer

    trainer = Trainer(model.source, ParallelConfig(), OptimConfig(), head="lm", dtype="float32", seed=1, total_steps=6)
    ours = work / name / "step_3"
    save(trainer, ours, dtype="float32", step=3, keep_last=None)
    again = stock_model(spec, seed=6)
    result["args"] = stock_load(again, ours)
    result["ours read by theirs"] = float((stock_logits(again, tokens_1T, spec.vocab_size) - wanted).abs().max())
    return result


def main() -> None:
    work, directories = Path(sys.argv[1]), {"dense": Path(sys.argv[2]), "moe": Path(sys.argv[3])}
    import torch.distributed as dist

    from mrlhf.config.options import ParallelConfig
    from mrlhf.parallel import state

    # isort: split
    from megatron.core import parallel_state

    state.initialize(ParallelConfig(), seed=1)
    parallel_state._GLOBAL_MEMORY_BUFFER = None  # mrlhf has made it; Megatron's own model needs the rest
    parallel_state.initialize_model_parallel()
    result = {name: compare(name, hf, work) for name, hf in directories.items()}
    print("RESULT " + json.dumps(result, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
