"""config.json as transformers reads it: defaults, null, old and new names are those of its class for the model_type.

A key that neither a family reads nor the lists below name is refused if its value could switch something on. So no key
that changes the maths is ignored silently, whichever release of transformers introduces it.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from typing import Any

from mrlhf.errors import CheckpointError
from mrlhf.models.families.spec import MAX_LAYERS, Layer, Rope

log = logging.getLogger(__name__)
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
# Seen true in published models, and read neither by transformers nor by vLLM: they are ignored and named.
_WITHOUT_EFFECT = frozenset(
    """
    _commit_hash _flash_attn_2_enabled _num_labels _sliding_window_pattern attention_softmax_in_fp32 classifier_dropout
    hidden_dropout is_decoder is_llama_config keys_to_ignore_at_inference max_sequence_length model_max_length
    neftune_noise_alpha num_beam_groups output_past predict_special_tokens pretraining_tp
    scale_attention_softmax_in_fp32 tokenizer_model_max_length tokenizer_padding_side transformers.js_config typical_p
    use_flash_attn use_flash_attention_2
    """.split()
)
_REFUSED = {
    "quantization_config": "quantised weights",
    "compression_config": "quantised weights",
    "add_cross_attention": "cross attention",
    "is_encoder_decoder": "an encoder",
    "use_bidirectional_attention": "attention to later tokens",
}


class Fields:
    """A config.json that remembers which keys were read. given: the keys of the file itself."""

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given, self.where = given, where
        self._config = self._as_transformers_reads()
        self._read: set[str] = set()

    def _as_transformers_reads(self) -> Any:
        """The configuration object that transformers makes of the file. Raises CheckpointError where it makes none."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        for key in ("num_hidden_layers", "n_layer"):  # before transformers makes a list of so many layers
            if isinstance(n := self.given.get(key), int) and n > MAX_LAYERS:
                raise self.refuse(key, n, expected=f"1 to {MAX_LAYERS:,}")
        values = {k: copy.deepcopy(v) for k, v in self.given.items() if k not in _HARMLESS}
        logger = logging.getLogger("transformers")
        level, kind = logger.level, CONFIG_MAPPING[self.given["model_type"]]
        logger.setLevel(logging.CRITICAL)  # what it warns of is refused here or changes nothing
        try:
            return kind.from_dict(values)
        except Exception as error:  # its classes check types and sizes, each in its own way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            what = f"a field has an impossible value: transformers' {kind.__name__}: {reason[:500]}"
            raise CheckpointError(what, where=self.where) from error
        finally:
            logger.setLevel(level)

    def _name(self, key: str) -> str:
        """The key's name in transformers' class: of GPT-2's n_layer and num_hidden_layers, n_layer."""
        return self._config.attribute_map.get(key, key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as transformers reads it; `default` for a key that is not in the file nor in transformers' class.

        None only where it means that the feature is off.
        """
        self.ignore(key)
        return getattr(self._config, key, default)

    def ignore(self, *keys: str) -> None:
        """Marks keys as read that change nothing for this family."""
        self._read.update(map(self._name, keys))

    def need(self, *keys: str) -> list[Any]:
        """The values of these keys. Raises CheckpointError naming all that are missing in the file."""
        there = {self._name(k) for k, v in self.given.items() if v is not None}
        missing = [key for key in keys if self._name(key) not in there]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} missing", where=self.where)
        return [self.get(key) for key in keys]

    def only(self, key: str, *allowed: Any) -> None:
        """Raises CheckpointError unless the key is absent or has one of the values that this version supports."""
        value = self.get(key, allowed[0])
        if value not in allowed and not (value is None and not hasattr(type(self._config), key)):
            raise self.refuse(key, value, expected=" or ".join(map(repr, allowed)))

    def refuse(self, key: str, value: Any, *, reason: str = "", expected: str | None = None) -> CheckpointError:
        text = f"{key} = {_shown(value)}{reason} cannot be expressed in this version"
        return CheckpointError(text, where=self.where, expected=expected)

    def check_all_read(self) -> None:
        """Raises CheckpointError for keys that were not read and could switch something on; names the others once."""
        from transformers import GenerationConfig

        for key, what in _REFUSED.items():
            if self.given.get(key):
                raise self.refuse(key, self.given[key], reason=f": {what}")
        if not self.given.get("is_causal", True):
            raise self.refuse("is_causal", self.given["is_causal"], reason=": attention to later tokens")
        harmless = _HARMLESS | vars(GenerationConfig()).keys()
        ignored = {k: v for k, v in self.given.items() if self._name(k) not in self._read and k not in harmless}
        unknown = [k for k, v in ignored.items() if k not in _WITHOUT_EFFECT and _switches_on(v)]
        if unknown:
            shown = ", ".join(f"{key} = {_shown(ignored[key])}" for key in sorted(unknown)[:5])
            raise CheckpointError(f"not known for model_type = {self.given['model_type']!r}: {shown}",
                                  where=self.where, expected="fields that transformers reads for this architecture",
                                  fix="remove them from config.json if they change nothing")
        if ignored:
            _note(f"{self.where}: ignored, they change nothing: {', '.join(sorted(ignored))}")

    def common(self, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
        """The fields of ModelSpec that most families read from the same keys."""
        layers, hidden, ffn, heads, vocab = self.need("num_hidden_layers", "hidden_size", "intermediate_size",
                                                      "num_attention_heads", "vocab_size")
        head_dim = self.get("head_dim")
        return {
            "family": self.get("model_type"),
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "num_attention_heads": heads,
            "num_query_groups": self.get("num_key_value_heads"),
            "head_dim": hidden // heads if head_dim is None else head_dim,
            "vocab_size": vocab,
            "max_position_embeddings": self.get("max_position_embeddings"),
            "norm_eps": self.get(eps),
            "tied": self.get("tie_word_embeddings"),
            "init_std": self.get("initializer_range"),
            "layers": (Layer(),) * layers,
        }

    def windows(self, size: int | None) -> list[int | None]:
        """Each layer's window, from layer_types. size: the window of sliding attention."""
        types, sizes = self.get("layer_types"), {"full_attention": None, "sliding_attention": size}
        if set(types) - set(sizes) or (size is None and "sliding_attention" in types):
            expected = "full_attention, or sliding_attention with a sliding_window that is on"
            raise self.refuse("layer_types", sorted(set(types)), expected=expected)
        return [sizes[t] for t in types]

    def rope(self, *, partial: bool = False, interleaved: bool = False, key: str | None = None,
             yarn: bool = False) -> Rope:
        """Rotary positions from transformers' rope_parameters (per kind of layer: `key`).

        partial: whether the architecture can leave dimensions without rotation.
        yarn: whether the family's attention applies yarn's factor (`Rope.qk_scale`); if not, yarn is refused.
        """
        self.ignore("rope_scaling", "rope_theta", "partial_rotary_factor")  # they are in rope_parameters
        parameters = self.get("rope_parameters")
        values = {k: v for k, v in (parameters[key] if key else parameters).items() if v is not None and k != "type"}
        theta, kind, fraction = (values.pop(k, None) for k in ("rope_theta", "rope_type", "partial_rotary_factor"))
        fraction = 1.0 if fraction is None else fraction
        if not partial and fraction != 1.0:
            raise self.refuse("partial_rotary_factor", fraction, expected="1.0")
        llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        names, optional = {"default": (), "linear": ("factor",), "llama3": llama3}, set()
        if yarn:
            names["yarn"] = ("factor", "original_max_position_embeddings")
            optional = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} if kind == "yarn" else set()
        if kind not in names or set(values) - optional != set(names[kind]):
            expected = f"one of {', '.join(names)}, with their own factors"
            what = f"rotary scaling {_shown(kind)} {_shown(values)} is not supported"
            raise CheckpointError(what, where=self.where, expected=expected)
        numbers = {"original_length" if k.startswith("original") else k: v for k, v in values.items()}
        scaling: Any = "none" if kind == "default" else kind
        return Rope(theta, fraction, interleaved, scaling, **numbers)


def _switches_on(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_switches_on, value.values() if isinstance(value, dict) else value))
    return bool(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


@functools.cache
def _note(text: str) -> None:
    log.info(text)
