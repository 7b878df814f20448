"""The models and layouts of attention_program.py."""

from __future__ import annotations

ROW = 400  # tokens of the longest sample
LAYOUTS = ("packed", "left", "right")
EXPERTS = {"expert_model_parallel_size": 2}
WHOLE = {"recompute": "full"}
PARTS = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}
CASES: dict[str, tuple[str, str, dict]] = {
    "groups": ("llama", "bfloat16", {}),
    "groups fp32": ("llama", "float32", {}),
    "groups recomputed": ("llama", "bfloat16", WHOLE),
    "groups in parts": ("llama", "bfloat16", PARTS),
    "window": ("qwen2_window", "bfloat16", {"recompute": "selective"}),
    "window fp32": ("qwen2_window", "float32", {}),
    "window fp32 in parts": ("qwen2_window", "float32", PARTS),
    "softcap": ("gemma2", "bfloat16", WHOLE),
    "softcap fp32 in parts": ("gemma2", "float32", PARTS),
    "narrow values": ("deepseek_v3_dense", "bfloat16", {}),
    "narrow values fp32": ("deepseek_v3_dense", "float32", {}),
    "experts": ("mixtral", "bfloat16", {}),
    "experts over ranks": ("mixtral", "bfloat16", EXPERTS),
}
