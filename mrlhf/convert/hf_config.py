"""config.json of an exported model: dtype, the class of a value model, and its padding token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrlhf.checkpoint.source import ModelSource
from mrlhf.data.tokenizers.hf import load_tokenizer
from mrlhf.errors import CheckpointError
from mrlhf.models.families import classifier_class
from mrlhf.models.families.spec import read_hf_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def export_config(source: ModelSource, dtype: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json for the export or None to keep the checkpoint's own, notes). dtype: None keeps the config's."""
    config = read_hf_config(source.hf_dir)
    notes: list[str] = []
    key = "dtype" if "dtype" in config else "torch_dtype"
    changes: dict[str, Any] = {} if dtype is None or config.get(key) == dtype else {key: dtype}
    if source.head == "value":
        wanted = classifier_class(source.spec)
        if not wanted:
            what = f"transformers has no class for a value model of {source.spec.family}"
            raise CheckpointError(what, where=str(source.path))
        if config.get("architectures") != [wanted]:
            changes |= {"architectures": [wanted], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        changes |= _pad_token(config, source.hf_dir, notes)
        if "reward_mean" in source.manifest:
            mean, std = source.manifest["reward_mean"], source.manifest["reward_std"]
            normalised = f"(score - {mean:.6g}) / {std:.6g}"
            notes.append(f"scores are raw; normalised = {normalised}, which config.json has no place for")
    return ({**config, **changes} if changes else None), notes


def _pad_token(config: Mapping[str, Any], hf_dir: Path, notes: list[str]) -> dict[str, int | None]:
    """transformers scores the last token that is not `pad_token_id`: it must be set, and must not end sequences."""
    # without these files transformers would invent a tokenizer with a single id
    if not any((hf_dir / file).is_file() for file in _TOKENIZER_FILES):
        notes.append(f"pad_token_id stays {config.get('pad_token_id')}: the checkpoint has no tokenizer")
        return {}
    loaded = load_tokenizer(hf_dir)
    pad = config.get("pad_token_id")
    if pad is None:
        pad = loaded.pad_token_id
    if pad is not None and pad == loaded.eos_token_id:
        notes.append(
            f"pad_token_id set to null: {pad} also ends sequences, and transformers would score the token before it; "
            "batch size 1 only"
        )
        pad = None
    return {} if pad == config.get("pad_token_id") else {"pad_token_id": pad}
