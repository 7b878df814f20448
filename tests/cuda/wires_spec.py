"""The layouts of wires_program.py, and a small model."""

from __future__ import annotations

from mrlhf.models.families.spec import Experts, Layer, ModelSpec, Rope

HIDDEN, WORLD = 64, 8
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
# name -> (layout, the ranks, MoE)
CASES: dict[str, tuple[dict, tuple[int, ...], bool]] = {
    "dp": ({}, (0, 1), False),
    "tp+sp": (SP, (0, 1), False),
    "pp": (PP, (0, 4), False),
    "tp+sp pp": (SP | PP, (1, 5), False),
    "pp 4": ({"pipeline_model_parallel_size": 4}, (0, 2, 4, 6), False),
    "vpp": (VPP, (0, 4), False),
    "tp+sp vpp": (SP | VPP, (0, 4), False),
    "cp pp": ({"context_parallel_size": 2} | PP, (0, 4), False),
    "ep pp": ({"expert_model_parallel_size": 2} | PP, (0, 4), True),
}
DETERMINISTIC = ("pp", "ep pp")  # with train.deterministic


def make_spec(moe: bool) -> ModelSpec:
    return ModelSpec(
        family="qwen3_moe" if moe else "llama", num_layers=4, hidden_size=HIDDEN, ffn_hidden_size=128,
        num_attention_heads=4, num_query_groups=2, head_dim=16, vocab_size=512, max_position_embeddings=512,
        norm_eps=1e-6, tied=False, layers=tuple(Layer(moe=moe) for _ in range(4)), ropes=(Rope(theta=1e4),),
        qk_norm="head" if moe else "none", experts=Experts(4, 2, 32) if moe else None,
    )  # fmt: skip
