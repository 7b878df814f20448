"""config.json is read as transformers reads it: against its own models for random files, and for published ones."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from models.families.published import PUBLISHED
from mrlhf.errors import CheckpointError
from mrlhf.models.families import FAMILIES, spec_from_hf
from mrlhf.models.families.rope_frequencies import inverse_frequencies

ABSENT = object()
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "pad_token_id": None,  # the default of some classes is beyond this vocabulary
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# key -> values beside "absent"; a key of every family that the family's transformers class knows, and null
ANY: dict[str, list[Any]] = {
    "num_key_value_heads": [2, 16, None],
    "head_dim": [8, 16, None],
    "max_position_embeddings": [512, 8192],
    "tie_word_embeddings": [True, False],
    "rope_theta": [5e5, 1e4],
    "rope_scaling": [None, {"type": "linear", "factor": 2.0}, {**LLAMA3, "original_max_position_embeddings": 32}, YARN],
    "rope_parameters": [None, {"rope_type": "default", "rope_theta": 2e5}, {"rope_type": "linear", "factor": 3.0},
                        {**LLAMA3, "rope_theta": 3e5, "original_max_position_embeddings": 16}],
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
TYPES = [None, [FULL, SLIDING, FULL], [FULL] * 3]
WINDOW = {"sliding_window": [None, 7, 4096]}
QWEN = {**WINDOW, "use_sliding_window": [True, False], "max_window_layers": [0, 1, 3], "layer_types": TYPES}
EPS = {"rms_norm_eps": [1e-5, 1e-6]}
BIAS = {"attention_bias": [True, False]}
GEMMA2 = {**WINDOW, **BIAS, **EPS, "layer_types": TYPES, "query_pre_attn_scalar": [50],
          "attn_logit_softcapping": [None, 20.0], "final_logit_softcapping": [None, 10.0]}  # fmt: skip
LATENT = {"kv_lora_rank": [8], "q_lora_rank": [None, 12], "qk_nope_head_dim": [8], "qk_rope_head_dim": [8],
          "v_head_dim": [4], "n_routed_experts": [8], "moe_intermediate_size": [8], "n_shared_experts": [1, 2],
          "first_k_dense_replace": [1, 2], "num_experts_per_tok": [2], "norm_topk_prob": [False], "n_group": [2],
          "topk_group": [1], "rope_parameters": [None, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}],
          "num_key_value_heads": [16]}  # fmt: skip
KEYS: dict[str, dict[str, list[Any]]] = {
    "llama": {**EPS, **BIAS, "mlp_bias": [True, False], "pretraining_tp": [2]},
    "mistral": {**EPS, **WINDOW},
    "mixtral": {**EPS, **WINDOW, "num_local_experts": [4], "num_experts_per_tok": [1]},
    "qwen2": {**EPS, **QWEN, "use_mrope": [False]},
    "qwen3": {**EPS, **QWEN, **BIAS},
    "qwen3_moe": {**EPS, **BIAS, **QWEN, "layer_types": [None], "num_experts": [4], "decoder_sparse_step": [2],
                  "mlp_only_layers": [[0], []], "moe_intermediate_size": [8], "norm_topk_prob": [True],
                  "num_experts_per_tok": [2]},
    "gemma": {**EPS, **BIAS, "hidden_act": ["gelu", "gelu_pytorch_tanh"]},
    "gemma2": GEMMA2,
    "gemma3_text": {**GEMMA2, "sliding_window_pattern": [2, 3], "rope_local_base_freq": [3e4],
                    "rope_parameters": [None, {FULL: {"rope_type": "linear", "factor": 8.0},
                                               SLIDING: {"rope_type": "default", "rope_theta": 2e4}},
                                        {SLIDING: {"rope_type": "linear", "factor": 2.0}}]},
    "phi3": {**EPS, **WINDOW, "attention_bias": [False], "partial_rotary_factor": [0.5]},
    "gpt2": {"n_inner": [None, 20], "layer_norm_epsilon": [1e-4], "tie_word_embeddings": [True, False]},
    "olmo2": {**EPS, **BIAS},
    "granite": {**EPS, **BIAS, "mlp_bias": [True], "embedding_multiplier": [2.0, 3], "logits_scaling": [4.0, 2],
                "residual_multiplier": [0.5], "attention_multiplier": [0.3]},
    "glm4": {**EPS, **BIAS, "partial_rotary_factor": [0.25, 1.0]},
    "starcoder2": {**WINDOW, "norm_epsilon": [1e-4], "use_bias": [True, False]},
    "smollm3": {**EPS, **WINDOW, **BIAS, "mlp_bias": [True], "layer_types": TYPES, "use_sliding_window": [True],
                "no_rope_layers": [None, [1, 0, 1]], "no_rope_layer_interval": [2]},
    "seed_oss": {**EPS, **BIAS, "attention_out_bias": [True], "mlp_bias": [True]},
    "deepseek_v2": {**LATENT, "topk_method": ["group_limited_greedy", "greedy"], "routed_scaling_factor": [1.5]},
    "deepseek_v3": {**LATENT, "rope_interleave": [False], "norm_topk_prob": [True, False]},
}  # fmt: skip
# latent attention and experts have sizes that a test cannot leave at their defaults
NEEDED = {"deepseek_v2", "deepseek_v3"}


def draw(family: str, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{family} {seed}")
    sizes = SIZES
    if family == "gpt2":
        sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = {**sizes, "model_type": family}
    options = {**({} if family == "gpt2" else ANY), **KEYS[family]}
    for key, values in options.items():
        needed = family in NEEDED and key in LATENT and key not in ("rope_parameters", "q_lora_rank")
        value = rng.choice(values if needed else [ABSENT, ABSENT, *values])
        if value is not ABSENT:
            config[key] = copy.deepcopy(value)
    if family == "qwen3_moe":
        config |= {"num_experts": config.get("num_experts", 4), "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    return config


def transformers_model(config: dict[str, Any]) -> Any:
    """A model that transformers makes of a config.json, or None if it makes none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = copy.deepcopy(config)
    try:
        made = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        return AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    except Exception:
        return None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_configs_mean_what_transformers_makes_of_them(family: str) -> None:
    torch.set_num_threads(1)
    both = 0
    for seed in range(30):
        config = draw(family, seed)
        model = transformers_model(config)
        try:
            spec = spec_from_hf(config)
        except CheckpointError as error:
            not_here = ("rotary scaling", "partial_rotary", "layer_types", "do not divide", "head_dim = ")
            assert model is None or any(text in str(error) for text in not_here), (config, error)
            continue
        if model is None and "head_dim" in config:  # null: not every class reads it as hidden_size / heads
            assert config["head_dim"] is None, config
            continue
        assert model is not None, config
        theirs, both = model.config, both + 1
        biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
        count = sum(p.numel() for p in [*model.parameters(), *biases])
        assert spec.num_parameters == count, (config, spec)
        assert spec.tied == (model.lm_head.weight is model.get_input_embeddings().weight), config
        types = getattr(theirs, "layer_types", None) if family != "qwen3_moe" else None
        window = getattr(theirs, "sliding_window", None)
        windows = [window] * 3 if types is None else [window if t == SLIDING else None for t in types]
        assert [layer.window for layer in spec.layers] == windows, config
        eps = [getattr(theirs, name, None) for name in ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon")]
        assert spec.norm_eps in eps and spec.max_position_embeddings == theirs.max_position_embeddings, config
        caps = (getattr(theirs, "attn_logit_softcapping", None), getattr(theirs, "final_logit_softcapping", None))
        assert (spec.attention_softcap, spec.logit_softcap) == caps, config
        if family == "gpt2":
            continue
        attention = model.model.layers[0].self_attn
        scale = spec.qk_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        assert scale == pytest.approx(getattr(attention, "scaling", None), rel=1e-12), config
        rotary = model.model.rotary_emb
        names = ["full_attention_inv_freq", "sliding_attention_inv_freq"] if len(spec.ropes) > 1 else ["inv_freq"]
        for rope, name in zip(spec.ropes, names, strict=True):
            if not hasattr(rotary, name):  # no layer has this kind of attention
                continue
            ours = inverse_frequencies(rope, spec.rope_dim)
            torch.testing.assert_close(ours, getattr(rotary, name), rtol=1e-6, atol=0, msg=f"{config}")
    assert both >= 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name: str) -> None:
    config, parameters = PUBLISHED[name]
    spec = spec_from_hf(config)
    assert spec.num_parameters == parameters
    windows = {layer.window for layer in spec.layers}
    assert windows == {
        "Phi-3-mini-4k": {2047}, "Mistral-7B-v0.1": {4096}, "gemma-2-9b": {4096, None}, "gemma-3-1b": {512, None},
        "starcoder2-3b": {4096},
    }.get(name, {None})  # fmt: skip


ON = [
    ("llama", "attn_logit_softcapping", 50.0), ("llama", "use_qk_norm", True), ("llama", "attention_sink", True),
    ("llama", "sliding_window", 4096), ("llama", "rope_interleaved", True), ("llama", "is_causal", False),
    ("llama", "is_causal", None), ("llama", "layer_types", ["full_attention"] * 3), ("llama", "logit_scale", 0.5),
    ("llama", "per_layer_config", {"0": {"hidden_act": "gelu"}}), ("llama", "moe", {"experts": [0, {"n": 1}]}),
    ("llama", "position_embedding_type", "alibi"), ("llama", "quantization_config", {"bits": 4}),
    ("llama", "attention_multiplier", float("nan")), ("qwen2", "qk_norm", True), ("qwen3", "use_qk_norm", False),
    ("phi3", "attention_bias", True), ("phi3", "lm_head_bias", True), ("gemma", "hidden_activation", "relu"),
    ("gemma2", "hidden_activation", "gelu"), ("gemma2", "sliding_window_pattern", 3), ("mistral", "layer_types", None),
    ("qwen2", "layer_types", [SLIDING] * 3), ("gpt2", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("deepseek_v3", "num_nextn_predict_layers", 1), ("starcoder2", "scale_attn_weights", False),
    ("smollm3", "layer_types", [SLIDING] * 3), ("glm4", "use_bidirectional_attention", True),
]  # fmt: skip


@pytest.mark.parametrize(("family", "key", "value"), ON)
def test_a_key_that_could_switch_something_on_is_refused(family: str, key: str, value: object) -> None:
    config = draw(family, -1)
    config = {k: v for k, v in config.items() if k in SIZES or family in ("gpt2", *NEEDED)} | {"model_type": family}
    config |= {} if family in ("gpt2", *NEEDED) else {"num_key_value_heads": 16}
    spec_from_hf(config)
    with pytest.raises(CheckpointError, match=key):
        spec_from_hf({**config, key: value})


@pytest.mark.parametrize("value", [False, None, 0, 0.0, "", [], {}, {"a": {"b": [0, None, False]}}])
def test_a_key_that_is_off_is_ignored_and_named_once(value: object, caplog: pytest.LogCaptureFixture) -> None:
    config, where = {**SIZES, "model_type": "llama", "some_feature": value}, f"config.json of {value!r}"
    caplog.set_level("INFO")
    for _ in range(2):
        spec_from_hf(config, where=where)
    assert [r.message for r in caplog.records] == [f"{where}: ignored, they change nothing: some_feature"]
