"""Models at real widths with few layers, and small ones: what --dry-run must estimate of their ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": True,
}  # fmt: skip
_GPT2 = {
    "model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_positions": 1024, "n_inner": None, "vocab_size": 50257,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip
_SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
          "vocab_size": 2048, "num_hidden_layers": 2}  # fmt: skip
MODELS = {"gemma2": _GEMMA2, "qwen3": _QWEN3, "gpt2": _GPT2}  # beside those of benchmarks/rehearse.py
LLAMA, MOE, LATENT = "Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V3"


@dataclass(frozen=True)
class Case:
    """options: of `rehearse` in benchmarks/rehearse.py."""

    label: str
    model: str
    layers: int
    parallel: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    rank: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    distributed: bool = True


def _sizes(tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, vpp: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp, "expert_model_parallel_size": ep, "virtual_pipeline_model_parallel_size": vpp,
        **more,
    }  # fmt: skip


_VALUE, _FP32 = {"head": "value"}, {"dtype": "float32"}
_LEFT = {"packing": False, "side": "left", "lengths": (1024, 1000, 900, 800)}
_FEW = {"vocab_size": 4096}  # so that the layers need most, not the head
CASES = [
    Case("one rank", LLAMA, 2),
    Case("fp32", LLAMA, 2, options=_FP32),
    Case("padded on the right", LLAMA, 2, options={"packing": False}),
    Case("padded on the left", LLAMA, 2, options=_LEFT),
    Case("value head", LLAMA, 2, options=_VALUE),
    Case("value head in TP", LLAMA, 2, _sizes(8, sequence_parallel=False), 8, options=_VALUE, changes=_FEW),
    Case("layers", LLAMA, 4, changes=_FEW),
    Case("one long row", LLAMA, 2, _sizes(2), 2, options={"lengths": (8192,)}),
    Case("eight rows", LLAMA, 2, _sizes(8), 8, options={"packing": False, "lengths": (512,) * 8}),
    Case("TP without SP", LLAMA, 2, _sizes(8, sequence_parallel=False), 8),
    Case("TP with SP", LLAMA, 4, _sizes(8), 8, 5),
    Case("recomputed", LLAMA, 4, _sizes(recompute="full"), changes=_FEW),
    Case("recomputed in TP", LLAMA, 4, _sizes(2, recompute="full"), 2, changes=_FEW),
    Case("attention recomputed", LLAMA, 2, _sizes(recompute="selective"), changes=_FEW),
    Case("CP", LLAMA, 2, _sizes(cp=2), 2, changes=_FEW),
    Case("first of two stages", LLAMA, 4, _sizes(pp=2), 2, 0),
    Case("last of two stages", LLAMA, 4, _sizes(pp=2), 2, 1),
    Case("second of four stages", LLAMA, 4, _sizes(2, 4), 8, 2),
    Case("interleaved", LLAMA, 8, _sizes(2, 2, vpp=2), 4, 0),
    Case("interleaved, last", LLAMA, 8, _sizes(2, 2, vpp=2), 4, 2),
    Case("a pipeline recomputed", LLAMA, 8, _sizes(2, 2, recompute="full"), 4, 0),
    Case("16 replicas", LLAMA, 2, _sizes(2), 32, 7),
    Case("16 replicas, whole optimizers", LLAMA, 2, _sizes(2), 32, 7, distributed=False),
    Case("tied", "qwen3", 2),
    Case("tied, few tokens", "qwen3", 2, options={"lengths": (256,)}),
    Case("tied, last of two stages", "qwen3", 2, _sizes(4, 2), 8, 4),
    Case("softcaps", "gemma2", 2, _sizes(4), 4, options={"lengths": (4096,)}),
    Case("softcaps, value head", "gemma2", 2, _sizes(4), 4, options={"lengths": (8192,), **_VALUE}, changes=_FEW),
    Case("learned positions", "gpt2", 4),
    Case("EP", MOE, 2, _sizes(ep=8), 8, 3),
    Case("EP, value head", MOE, 2, _sizes(ep=8), 8, 3, options=_VALUE),
    Case("EP recomputed", MOE, 2, _sizes(ep=8, recompute="full"), 8, options=_VALUE),
    Case("experts in TP", MOE, 2, _sizes(4), 4, options=_VALUE),
    Case("EP and TP", MOE, 2, _sizes(4, ep=8), 8, options=_VALUE),
    Case("latent attention", LATENT, 4, _sizes(8, ep=32), 32, 9),
    Case("latent attention, first stage", LATENT, 6, _sizes(8, 2, ep=32), 64, 9),
    Case("latent attention, last stage", LATENT, 6, _sizes(8, 2, ep=32), 64, 41),
    Case("small", LLAMA, 2, changes=_SMALL, options={"lengths": (64, 100, 30)}),
    Case("small in TP and CP", LLAMA, 2, _sizes(2, cp=2), 4, changes=_SMALL, options={"lengths": (64, 100, 32)}),
    Case("small experts", MOE, 2, _sizes(ep=2), 2,
         changes={**_SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
         options={"lengths": (64, 100, 32)}),
]  # fmt: skip
