"""config.json read field by field: what a family did not ask for and nobody has called harmless is refused.

A field that changes the maths can so never be passed over, whichever release of transformers invents it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrlhf.errors import CheckpointError
from mrlhf.models.families.spec import Layer, Rope

# Say nothing about what the weights compute. Dropout acts in training only, and mrlhf trains without it.
_HARMLESS = frozenset(
    """
    architectures auto_map bos_token_id cache_implementation chunk_size_feed_forward dtype eos_token_id finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label label2id max_length min_length model_type name_or_path _name_or_path num_labels
    output_attentions output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version use_cache _attn_implementation_autoset _attn_implementation attn_implementation
    attention_dropout attn_pdrop embd_pdrop resid_pdrop embedding_dropout residual_dropout summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj output_router_logits router_aux_loss_coef unsloth_fixed unsloth_version
    """.split()
)
_REFUSED = {
    "quantization_config": "quantised weights",
    "add_cross_attention": "cross attention",
    "is_encoder_decoder": "an encoder",
    "use_bidirectional_attention": "attention to later tokens",
}


class Fields:
    """A config.json, and which of its keys have been read. A key whose value is null counts as absent."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._config = {k: v for k, v in config.items() if v is not None}
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._config.get(key, default)

    def need(self, *keys: str) -> list[Any]:
        """Their values. Raises CheckpointError naming every one that is missing."""
        missing = [key for key in keys if key not in self._config]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} missing", where=self.where)
        return [self.get(key) for key in keys]

    def only(self, key: str, *allowed: Any) -> None:
        """Absent, or one of these values: the others cannot be expressed."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.refuse(key, value, expected=" or ".join(map(repr, allowed)))

    def refuse(self, key: str, value: Any, *, expected: str | None = None) -> CheckpointError:
        return CheckpointError(f"{key} = {value!r} cannot be expressed in this version", where=self.where, expected=expected)

    def finish(self) -> None:
        """Raises CheckpointError for what nobody has read."""
        for key, what in _REFUSED.items():
            if self.get(key):
                raise CheckpointError(f"{key} = {self.get(key)!r}: {what} cannot be expressed in this version", where=self.where)
        unknown = sorted(set(self._config) - self._read - _HARMLESS)
        if unknown:
            shown = ", ".join(f"{key} = {self._config[key]!r}" for key in unknown[:5])
            raise CheckpointError(
                f"not known for model_type = {self._config.get('model_type')!r}: {shown}", where=self.where,
                expected="fields that transformers writes for this architecture",
                fix="remove them from config.json if they change nothing",
            )  # fmt: skip

    def common(self) -> dict[str, Any]:
        """The fields of ModelSpec that most families write under the same names."""
        layers, hidden, ffn, heads, vocab = self.need(
            "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"
        )
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

    def rope(
        self, *, theta: float = 10000.0, partial: float | None = None, interleaved: bool = False, key: str | None = None, yarn: bool = False
    ) -> Rope:
        """transformers >= 5 writes rope_parameters (with `key`: of that kind of layer), older ones rope_theta and rope_scaling.

        partial: the default share of rotated dimensions; None: the architecture always rotates all of them.
        yarn: the family's attention multiplies by what it asks for (`Rope.qk_scale`); else it is refused.
        """
        old = self.get("rope_scaling", {})
        found = self.get("rope_parameters", old)
        values = dict(found.get(key, {}) if key and key in found else found)
        theta = float(values.pop("rope_theta", self.get("rope_theta", theta)))
        kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
        values.pop("type", None)
        fraction = float(values.pop("partial_rotary_factor", self.get("partial_rotary_factor", partial or 1.0)))
        if partial is None and fraction != 1.0:
            raise self.refuse("partial_rotary_factor", fraction, expected="1.0")
        names = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        optional = set()
        if yarn:
            names["yarn"] = ("factor", "original_max_position_embeddings")
            optional = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} if kind == "yarn" else set()
        if kind not in names or set(values) - optional != set(names[kind]):
            known = ", ".join(names)
            raise CheckpointError(
                f"rotary scaling {kind!r} {values} is not supported", where=self.where, expected=f"one of {known}, with their own factors"
            )
        numbers = {"original_length" if k.startswith("original") else k: v for k, v in values.items()}
        scaling: Any = "none" if kind == "default" else kind
        return Rope(theta, fraction, interleaved, scaling, **numbers)
