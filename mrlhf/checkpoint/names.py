"""Names of one tensor in checkpoints: Megatron's spec for Transformer Engine, its local spec, and earlier ones of ours.

mrlhf writes those of Transformer Engine's spec (models/layer_spec.py): a norm has the name of the linear layer behind
it. The index gives a norm that the local spec names otherwise a second name. All names are read.
"""

from __future__ import annotations

from collections.abc import Collection

# Transformer Engine's spec -> mrlhf until format 3. The local spec has the left names for models with grouped-query
# attention, also in layers with experts, and the right ones for latent attention.
_NORMS = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".self_attention.linear_q_up_proj.layer_norm_", ".self_attention.q_layernorm."),
    (".self_attention.linear_kv_up_proj.layer_norm_", ".self_attention.kv_layernorm."),
)
# mrlhf's own names of the projections of latent attention, until format 3; q_proj without a query vector
_PROJECTIONS = tuple(
    (f".self_attention.{theirs}.", f".self_attention.{ours}.")
    for theirs, ours in (
        ("linear_q_proj", "linear_q_up"), ("linear_q_up_proj", "linear_q_up"), ("linear_q_down_proj", "linear_q_down"),
        ("linear_kv_up_proj", "linear_kv_up"), ("linear_kv_down_proj", "linear_kv_down"),
    )
)


def plain_name(name: str) -> str:
    """The same for all names of a tensor, of the optimizer state too."""
    for other, plain in (*_NORMS, *_PROJECTIONS):
        name = name.replace(other, plain)
    return name


def second_names(names: Collection[str]) -> dict[str, str]:
    """{another name: name} of the norms that Megatron's local spec names otherwise than its Transformer Engine one."""
    latent = any(".self_attention.linear_kv_up_proj." in name for name in names)
    pairs = _NORMS[1:] if latent else [(plain, fused) for fused, plain in _NORMS[1:2]]
    return {name.replace(ours, local): name for ours, local in pairs for name in names if ours in name}
