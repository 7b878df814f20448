"""Gemma 1, Gemma 2 and the text models of Gemma 3.

Their norms multiply by 1 + weight, and the embedding is scaled by sqrt(hidden size). Gemma 2 adds norms after attention
and MLP, soft caps of scores and logits, and a sliding window in every other layer. Gemma 3 has norms of q and k instead
of caps, and five local layers for each global one; the two kinds have different rotary positions.
"""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import VLLM_LLAMA, Names
from mrlhf.models.families.spec import Layer, ModelSpec

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
    # Gemma 1 has hidden_act alone, where transformers reads "gelu" as the tanh form; the others hidden_activation alone
    f.only("hidden_act", "gelu_pytorch_tanh", *(() if kind == "gemma" else ("gelu",)))
    f.only("hidden_activation", "gelu_pytorch_tanh")
    bias = f.get("attention_bias")
    common = f.common()
    common |= {"norm": "rms_plus_one", "activation": "gelu_tanh", "embedding_scale": common["hidden_size"] ** 0.5}
    common |= {"qkv_bias": bias, "output_bias": bias}
    if kind == "gemma":
        return ModelSpec(**common, ropes=(f.rope(),))
    window, is_gemma3 = f.get("sliding_window"), kind == "gemma3_text"
    windows, ropes = f.windows(window), [f.rope(key="full_attention" if is_gemma3 else None)]
    if is_gemma3:
        f.ignore("rope_local_base_freq", "sliding_window_pattern")
        ropes.append(f.rope(key="sliding_attention"))
    else:
        f.only("sliding_window_size", window)
        f.only("sliding_window_pattern", 2)
    common["layers"] = tuple(Layer(window=w, rope=len(ropes) - 1 if w else 0) for w in windows)
    return ModelSpec(**common, ropes=tuple(ropes), post_norm=True, qk_norm="head" if is_gemma3 else "none",
                     attention_scale=f.get("query_pre_attn_scalar") ** -0.5,
                     attention_softcap=f.get("attn_logit_softcapping"),
                     logit_softcap=f.get("final_logit_softcapping"))
