"""Megatron-LM's directories: what its --load needs besides the tensors, and where the tensors of its checkpoints are.

    DIR/latest_checkpointed_iteration.txt    the number N of the newest checkpoint, or "release"
    DIR/iter_000000N/                        .metadata, *.distcp, metadata.json, and common.pt with `args`

A checkpoint of mrlhf is such a DIR: iter_000000N is a link to its dist/.
"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from mrlhf.errors import CheckpointError
from mrlhf.models.families.spec import VOCAB_MULTIPLE, ModelSpec
from mrlhf.models.gpt import CHECKPOINT_CONTENT

TRACKER = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"iter_\d{7,}|release")


def common_state(spec: ModelSpec, *, step: int) -> dict[str, Any]:
    """What `common.pt` holds for any model. `args` are Megatron-LM's, for --use-checkpoint-args and its own checks."""
    args: dict[str, Any] = {
        "num_layers": spec.num_layers, "hidden_size": spec.hidden_size, "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads, "num_query_groups": spec.num_query_groups,
        "group_query_attention": spec.num_query_groups != spec.num_attention_heads, "kv_channels": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings, "seq_length": spec.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if spec.learned_positions else "rope" if spec.ropes else "none",
        "add_bias_linear": spec.mlp_bias, "add_qkv_bias": spec.qkv_bias, "swiglu": spec.gated,
        "untie_embeddings_and_output_weights": not spec.tied, "qk_layernorm": spec.qk_norm != "none",
        "normalization": "LayerNorm" if spec.norm == "layer" else "RMSNorm", "norm_epsilon": spec.norm_eps,
        "apply_layernorm_1p": spec.norm == "rms_plus_one", "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "multi_latent_attention": spec.latent is not None, "padded_vocab_size": spec.padded_vocab_size,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE, "ckpt_format": "torch_dist", "no_save_optim": True,
        "no_save_rng": True, "tokenizer_type": "HuggingFaceTokenizer",
    }
    if spec.ropes:
        rope = spec.ropes[0]
        args |= {"rotary_base": int(rope.theta), "rotary_percent": 1.0, "rotary_interleaved": rope.interleaved}
    if spec.experts is not None:
        experts = spec.experts
        args |= {"num_experts": experts.num, "moe_router_topk": experts.top_k,
                 "moe_ffn_hidden_size": experts.ffn_hidden_size, "moe_router_score_function": experts.score,
                 "moe_router_pre_softmax": not experts.renormalise,
                 "moe_router_enable_expert_bias": experts.selection_bias,
                 "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
                 "moe_layer_freq": 1 if all(x.moe for x in spec.layers) else [int(x.moe) for x in spec.layers]}
    return {"args": argparse.Namespace(**args), "iteration": step, "checkpoint_version": 3.0,
            "content_metadata": dict(CHECKPOINT_CONTENT)}


def add_names(checkpoint: Path, *, step: int) -> None:
    """Makes a checkpoint a directory for Megatron-LM's --load. A converted model, of step 0, is a "release"."""
    (checkpoint / TRACKER).write_text(f"{step or 'release'}\n")
    with suppress(OSError):  # a file system without links
        os.symlink("dist", checkpoint / (f"iter_{step:07d}" if step else "release"), target_is_directory=True)


def find_tensors(directory: Path) -> Path | None:
    """Where the tensors of a Megatron-LM checkpoint are: `directory`, or the newest one in it; None for no checkpoint.

    Raises CheckpointError where the newest one is missing, or is not of the format torch_dist.
    """
    tracker = directory / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        name = f"iter_{int(text):07d}" if re.fullmatch(r"\d{1,12}", text) else text
        if not _NAME.fullmatch(name):
            what, expected = f"{text[:40]!r} is no iteration", "a number, or release"
            raise CheckpointError(what, where=str(tracker), expected=expected)
        directory = directory / name
    elif not _NAME.fullmatch(directory.name):
        return None
    if not (directory / ".metadata").is_file():
        kind = "it has the format torch" if any(directory.glob("mp_rank_*")) else "no .metadata in it"
        what, fix = f"no distributed checkpoint of Megatron-LM: {kind}", "save it with --ckpt-format torch_dist"
        raise CheckpointError(what, where=str(directory), expected=".metadata and *.distcp (torch_dist)", fix=fix)
    return directory
