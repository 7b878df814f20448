"""What a model is, apart from how it is spread: HF config.json -> ModelSpec.

A family that is not known, or a field that would change the maths and cannot be expressed, is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrlhf.config import ParallelConfig
from mrlhf.errors import CheckpointError, ConfigError

VOCAB_MULTIPLE = 64  # padding of the vocabulary, whatever TP is: checkpoint shapes do not depend on the layout, and vLLM cuts it alike


@dataclass(frozen=True)
class ModelSpec:
    family: str  # llama, qwen2, qwen3
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # Llama 3.1 scaling of the rotary frequencies
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    init_std: float

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Of the LM, without padding rows."""
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        layer = self.hidden_size * (qkv + self.num_attention_heads * self.head_dim + 3 * self.ffn_hidden_size + 2)
        layer += qkv * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return layer * self.num_layers + self.vocab_size * self.hidden_size * (1 if self.tied else 2) + self.hidden_size

    def flops_per_token(self, seq_length: float) -> float:
        """Forward + backward of one token in a sequence of this mean length (6 x matmul weights + attention)."""
        weights = self.num_parameters - (0 if self.tied else self.vocab_size * self.hidden_size)
        return 6 * weights + 6 * self.num_layers * self.num_attention_heads * self.head_dim * seq_length


def read_hf_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError("no config.json", where=str(directory), expected="a HF model directory")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path)) from error


def _rope(config: dict[str, Any], where: str) -> tuple[float, float | None]:
    """transformers >= 5 writes rope_parameters, older ones rope_theta and rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default":
        return theta, None
    # megatron-core has Llama 3.1's scaling with these three fixed
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(float(rope.get(k, v)) != v for k, v in fixed.items()):
        raise CheckpointError(f"rotary scaling {kind!r} {rope} is not supported", where=where, expected=f"none, or llama3 with {fixed}")
    return theta, float(rope["factor"])


def _partial_rotary(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def spec_from_hf(config: dict[str, Any], *, where: str = "config.json") -> ModelSpec:
    """Raises CheckpointError for families and fields that this version cannot express."""
    family = config.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(f"model_type = {family!r} is not supported", where=where, expected="llama, qwen2 or qwen3")
    refused = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "attention_bias": bool(config.get("attention_bias")) and family != "qwen2",
        "partial_rotary_factor": _partial_rotary(config) != 1.0,
        "attention_dropout": config.get("attention_dropout", 0.0) != 0.0,
        "quantization_config": config.get("quantization_config") is not None,
        "pretraining_tp": config.get("pretraining_tp", 1) != 1,
    }
    for key, is_bad in refused.items():
        if is_bad:
            raise CheckpointError(
                f"{key} = {config.get(key, config.get('rope_parameters'))!r} cannot be expressed in this version", where=where
            )
    needed: tuple[str, ...] = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    # transformers' own defaults for these differ between families and versions
    needed += () if family == "llama" else ("num_key_value_heads",)
    needed += ("head_dim",) if family == "qwen3" else ()
    missing = [key for key in needed if key not in config]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} missing", where=where)
    heads, theta_factor = int(config["num_attention_heads"]), _rope(config, where)
    return ModelSpec(
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta_factor[0],
        rope_factor=theta_factor[1],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        init_std=float(config.get("initializer_range", 0.02)),
    )


def check_layout(parallel: ParallelConfig, spec: ModelSpec, world: int) -> list[ConfigError]:
    """What does not divide: the model by TP and PP, the world by TP x PP."""
    tp, pp, found = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, []
    limits = {"num_attention_heads": spec.num_attention_heads, "num_key_value_heads (num_query_groups)": spec.num_query_groups}
    limits |= {"intermediate_size": spec.ffn_hidden_size, "the padded vocabulary's unit": VOCAB_MULTIPLE}
    wrong = [f"{name} = {size}" for name, size in limits.items() if size % tp]
    if wrong:
        good = [n for n in range(1, spec.num_query_groups + 1) if all(size % n == 0 for size in limits.values())]
        found.append(
            ConfigError(
                f"parallel.tensor_model_parallel_size = {tp} does not divide the model's {', '.join(wrong)}",
                where="parallel.tensor_model_parallel_size",
                expected=", ".join(map(str, good)),
                fix=f"--parallel.tensor_model_parallel_size {max(n for n in good if n <= max(tp, 1))}",
            )
        )
    if spec.num_layers % pp:
        good = [n for n in range(1, spec.num_layers + 1) if spec.num_layers % n == 0]
        found.append(
            ConfigError(
                f"parallel.pipeline_model_parallel_size = {pp} does not divide the model's num_hidden_layers = {spec.num_layers}",
                where="parallel.pipeline_model_parallel_size",
                expected=", ".join(map(str, good)),
            )
        )
    if world % (tp * pp):
        found.append(
            ConfigError(
                f"{world} ranks cannot be cut into tensor {tp} x pipeline {pp}",
                where="parallel",
                expected=f"a multiple of {tp * pp} ranks",
                fix=f"torchrun --nproc-per-node {tp * pp} -m mrlhf ...",
            )
        )
    return found
