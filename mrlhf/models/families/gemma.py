"""Gemma 1, Gemma 2 and the text models of Gemma 3.

Their norms multiply by 1 + weight, and the embedding is scaled by sqrt(hidden size). Gemma 2 adds norms after attention
and MLP, soft caps of scores and logits, and a sliding window in every other layer. Gemma 3 has norms of q and k instead
of caps, and five local layers for each global one; the two kinds have different rotary positions.
"""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import VLLM_LLAMA, Names
from mrlhf.models.families.spec import Layer, ModelSpec, Rope

CLASSIFIERS = {
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
}
_GEMMA2 = Names(attention_post_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
                mlp_post_norm="post_feedforward_layernorm")
NAMES = {"gemma": Names(), "gemma2": _GEMMA2, "gemma3_text": _GEMMA2}
VLLM = VLLM_LLAMA


def spec(f: Fields) -> ModelSpec:
    kind = f.get("model_type")
    f.need("num_key_value_heads", "head_dim")
    # early configs of Gemma 1 say "gelu" in hidden_act, which is all that transformers reads, and mean the tanh form
    f.only("hidden_act", "gelu_pytorch_tanh")
    f.only("hidden_activation", "gelu_pytorch_tanh")
    bias = bool(f.get("attention_bias", False))
    common = f.common()
    common["tied"] = bool(f.get("tie_word_embeddings", True))
    common |= {"norm": "rms_plus_one", "activation": "gelu_tanh", "embedding_scale": common["hidden_size"] ** 0.5}
    common |= {"qkv_bias": bias, "output_bias": bias}
    if kind == "gemma":
        return ModelSpec(**common, ropes=(f.rope(),))
    ropes, layers = _layers(f, common["num_layers"], kind)
    return ModelSpec(**{**common, "layers": layers}, ropes=ropes, post_norm=True,
                     qk_norm="head" if kind == "gemma3_text" else "none",
                     attention_scale=f.get("query_pre_attn_scalar", 256) ** -0.5,
                     attention_softcap=f.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
                     logit_softcap=f.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None))


def _layers(f: Fields, n: int, kind: str) -> tuple[tuple[Rope, ...], tuple[Layer, ...]]:
    pattern = f.get("sliding_window_pattern", f.get("_sliding_window_pattern", 2 if kind == "gemma2" else 6))
    types = f.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n)
    ]
    window = f.get("sliding_window", 4096)
    ropes = [f.rope(theta=1e6 if kind == "gemma3_text" else 1e4, key="full_attention")]
    if kind == "gemma3_text":
        theta = f.get("rope_local_base_freq", 10000.0)
        has_local = "sliding_attention" in f.get("rope_parameters", {})
        ropes.append(f.rope(key="sliding_attention") if has_local else Rope(theta))
    kinds = {"full_attention": Layer(), "sliding_attention": Layer(window=window, rope=len(ropes) - 1)}
    unknown = set(types) - set(kinds)
    if unknown:
        raise f.refuse("layer_types", sorted(unknown))
    return tuple(ropes), tuple(kinds[t] for t in types)
