"""config.json read field by field: a field that the family did not read and that is not known as harmless is refused.

So no field that changes the maths is ignored silently, whichever release of transformers introduces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrlhf.errors import CheckpointError
from mrlhf.models.families.spec import Layer, Rope

# These fields do not change what the weights compute. Dropout acts in training only, and mrlhf trains without it.
_HARMLESS = frozenset(
    """
    architectures auto_map bos_token_id cache_implementation chunk_size_feed_forward dtype eos_token_id finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label label2id max_length min_length model_type
    name_or_path _name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix problem_type
    return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript transformers_version use_cache
    _attn_implementation_autoset _attn_implementation attn_implementation attention_dropout attn_pdrop embd_pdrop
    resid_pdrop embedding_dropout residual_dropout summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj output_router_logits router_aux_loss_coef unsloth_fixed unsloth_version
    """.split()
)
_REFUSED = {
    "quantization_config": "quantised weights",
    "add_cross_attention": "cross attention",
    "is_encoder_decoder": "an encoder",
    "use_bidirectional_attention": "attention to later tokens",
}


class Fields:
    """A config.json that remembers which keys were read. A key whose value is null counts as absent."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._config = {k: v for k, v in config.items() if v is not None}
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._config.get(key, default)

    def ignore(self, *keys: str) -> None:
        """Marks keys as read that change nothing for this family."""
        self._read.update(keys)

    def need(self, *keys: str) -> list[Any]:
        """The values of these keys. Raises CheckpointError naming all that are missing."""
        missing = [key for key in keys if key not in self._config]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} missing", where=self.where)
        return [self.get(key) for key in keys]

    def only(self, key: str, *allowed: Any) -> None:
        """Raises CheckpointError unless the key is absent or has one of the values that this version supports."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.refuse(key, value, expected=" or ".join(map(repr, allowed)))

    def refuse(self, key: str, value: Any, *, reason: str = "", expected: str | None = None) -> CheckpointError:
        text = f"{key} = {value!r}{reason} cannot be expressed in this version"
        return CheckpointError(text, where=self.where, expected=expected)

    def check_all_read(self) -> None:
        """Raises CheckpointError for keys that were not read."""
        for key, what in _REFUSED.items():
            if self.get(key):
                raise self.refuse(key, self.get(key), reason=f": {what}")
        unknown = sorted(set(self._config) - self._read - _HARMLESS)
        if unknown:
            shown = ", ".join(f"{key} = {self._config[key]!r}" for key in unknown[:5])
            raise CheckpointError(f"not known for model_type = {self._config.get('model_type')!r}: {shown}",
                                  where=self.where, expected="fields that transformers writes for this architecture",
                                  fix="remove them from config.json if they change nothing")

    def common(self) -> dict[str, Any]:
        """The fields of ModelSpec that most families read from the same keys."""
        layers, hidden, ffn, heads, vocab = self.need("num_hidden_layers", "hidden_size", "intermediate_size",
                                                      "num_attention_heads", "vocab_size")
        return {
            "family": self.get("model_type"),
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "num_attention_heads": heads,
            "num_query_groups": self.get("num_key_value_heads", heads),
            "head_dim": self.get("head_dim", hidden // heads),
            "vocab_size": vocab,
            "max_position_embeddings": self.get("max_position_embeddings", 2048),
            "norm_eps": float(self.get("rms_norm_eps", 1e-6)),
            "tied": bool(self.get("tie_word_embeddings", False)),
            "init_std": float(self.get("initializer_range", 0.02)),
            "layers": (Layer(),) * layers,
        }

    def rope(self, *, theta: float = 10000.0, partial: float | None = None, interleaved: bool = False,
             key: str | None = None, yarn: bool = False) -> Rope:
        """transformers >= 5 writes rope_parameters (per kind of layer: `key`), older ones rope_theta and rope_scaling.

        partial: the default fraction of rotated dimensions; None: the architecture always rotates all of them.
        yarn: whether the family's attention applies yarn's factor (`Rope.qk_scale`); if not, yarn is refused.
        """
        old = self.get("rope_scaling", {})
        parameters = self.get("rope_parameters", old)
        values = dict(parameters.get(key, {}) if key and key in parameters else parameters)
        theta = float(values.pop("rope_theta", self.get("rope_theta", theta)))
        kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
        values.pop("type", None)
        fraction = float(values.pop("partial_rotary_factor", self.get("partial_rotary_factor", partial or 1.0)))
        if partial is None and fraction != 1.0:
            raise self.refuse("partial_rotary_factor", fraction, expected="1.0")
        llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        names, optional = {"default": (), "linear": ("factor",), "llama3": llama3}, set()
        if yarn:
            names["yarn"] = ("factor", "original_max_position_embeddings")
            optional = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} if kind == "yarn" else set()
        if kind not in names or set(values) - optional != set(names[kind]):
            expected = f"one of {', '.join(names)}, with their own factors"
            what = f"rotary scaling {kind!r} {values} is not supported"
            raise CheckpointError(what, where=self.where, expected=expected)
        numbers = {"original_length" if k.startswith("original") else k: v for k, v in values.items()}
        scaling: Any = "none" if kind == "default" else kind
        return Rope(theta, fraction, interleaved, scaling, **numbers)
