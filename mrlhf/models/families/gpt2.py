"""GPT-2: LayerNorm, learned positions, biases everywhere, a plain GELU MLP; HF keeps its matrices as [in, out]."""

from __future__ import annotations

from mrlhf.models.families.fields import Fields
from mrlhf.models.families.names import Names, VLLMNames
from mrlhf.models.families.spec import Layer, ModelSpec

CLASSIFIERS = {"gpt2": "GPT2ForSequenceClassification"}
NAMES = Names(embedding="transformer.wte", positions="transformer.wpe", final_norm="transformer.ln_f",
              layer="transformer.h.{i}.", attention_norm="ln_1", qkv=("attn.c_attn",), output="attn.c_proj",
              mlp_norm="ln_2", fc1=("mlp.c_fc",), fc2="mlp.c_proj", transposed=True)
VLLM = VLLMNames(qkv="attn.c_attn", fc1="mlp.c_fc")


def spec(f: Fields) -> ModelSpec:
    layers, hidden, heads, length, vocab = f.need("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    f.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.ignore("n_ctx", "reorder_and_upcast_attn")  # the latter is about the precision of one product
    ffn = f.get("n_inner")
    ffn = 4 * hidden if ffn is None else ffn
    return ModelSpec(family="gpt2", num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn,
                     num_attention_heads=heads, num_query_groups=heads, head_dim=hidden // heads, vocab_size=vocab,
                     max_position_embeddings=length, norm_eps=f.get("layer_norm_epsilon"),
                     tied=f.get("tie_word_embeddings"), layers=(Layer(rope=None),) * layers, ropes=(),
                     init_std=f.get("initializer_range"), norm="layer", activation="gelu_tanh",
                     gated=False, learned_positions=True, qkv_bias=True, output_bias=True, mlp_bias=True)
