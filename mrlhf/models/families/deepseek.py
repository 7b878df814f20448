"""DeepSeek-V2 and V3 (R1): latent attention, experts in groups beside shared ones, dense first layers.

V2 scores experts by a softmax over all of them, V3 by a sigmoid for each, with a bias that only affects the choice.
DeepSeek adjusted that bias outside the gradient; mrlhf does not train it.
"""

from __future__ import annotations

from mrlhf.errors import CheckpointError
from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import LLAMA, VLLM_LLAMA
from mrlhf.models.families.spec import Experts, Latent, Layer, ModelSpec

CLASSIFIERS = {
    "deepseek_v2": "DeepseekV2ForSequenceClassification",
    "deepseek_v3": "DeepseekV3ForSequenceClassification",
}
NAMES, VLLM = LLAMA, VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    f.only("hidden_act", "silu")
    f.only("attention_bias", False)
    f.only("mlp_bias", False)
    f.only("moe_layer_freq", 1)
    f.only("rms_norm_eps", 1e-6)  # for norms of latent vectors transformers ignores this field, vLLM does not
    extra_layers = f.given.get("num_nextn_predict_layers", f.given.get("num_mtp_layers", 0))
    if extra_layers:
        raise CheckpointError(
            f"num_nextn_predict_layers = {extra_layers}: layers that predict further tokens cannot be trained here",
            where=f.where, expected="0",
            fix="to leave them out, set it to 0 and remove model.layers.N for N >= num_hidden_layers from the weights "
            "and their index",
        )
    f.ignore("num_nextn_predict_layers", "num_mtp_layers", "ep_size", "seq_aux", "aux_loss_alpha", "qk_head_dim")
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace")
    kv_rank, nope, rope_dim, v_dim, first_k = map(f.get, sizes)
    if f.get("head_dim") != rope_dim:  # V3: transformers rotates as many dimensions as the file says here, also of null
        raise f.refuse("head_dim", f.get("head_dim"), expected=f"qk_rope_head_dim = {rope_dim}, or no head_dim")
    is_v3 = f.get("model_type") == "deepseek_v3"
    common = f.common()
    n, heads = common["num_layers"], common["num_attention_heads"]
    f.only("num_key_value_heads", heads)
    rope = f.rope(interleaved=f.get("rope_interleave") if is_v3 else True, yarn=True)
    layers, experts = tuple(Layer(moe=i >= first_k) for i in range(n)), _experts(f, is_v3=is_v3)
    return ModelSpec(**{**common, "num_query_groups": heads, "head_dim": v_dim, "layers": layers}, ropes=(rope,),
                     attention_scale=(nope + rope_dim) ** -0.5 * rope.scores_scale,
                     latent=Latent(kv_rank, f.get("q_lora_rank"), nope, rope_dim),
                     experts=experts if first_k < n else None)


def _experts(f: Fields, *, is_v3: bool) -> Experts:
    sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    num, top_k, ffn, shared = map(f.get, sizes)
    common = {"weight_scale": f.get("routed_scaling_factor"), "shared_ffn_hidden_size": ffn * shared}
    if is_v3:
        f.only("topk_method", "noaux_tc")
        f.only("scoring_func", "sigmoid")
        return Experts(num, top_k, ffn, f.get("norm_topk_prob"), "sigmoid", f.get("n_group"), f.get("topk_group"),
                       "best_two", selection_bias=True, **common)
    f.only("topk_method", "greedy", "group_limited_greedy")
    f.only("scoring_func", "softmax")
    f.only("norm_topk_prob", False)  # transformers ignores it, vLLM does not
    groups, top_groups = f.get("n_group"), f.get("topk_group")
    if f.get("topk_method") != "group_limited_greedy":
        groups = top_groups = 1
    return Experts(num, top_k, ffn, renormalise=False, groups=groups, top_groups=top_groups, **common)
