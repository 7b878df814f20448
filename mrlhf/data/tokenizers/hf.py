"""The tokenizer of a HF directory, and the ids that end an answer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec

from mrlhf.config.foreign import read_json
from mrlhf.data.tokenizers.vocabulary import load_tokenizer, tokenizer_fingerprint

__all__ = ["fingerprint", "load_tokenizer", "stop_ids"]


class _Stops(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


@functools.lru_cache(maxsize=8)
def fingerprint(hf_dir: Path) -> str:
    """SHA-256 of vocabulary, merges and special tokens; equal for copies. Raises DataError where there is none."""
    return tokenizer_fingerprint(str(hf_dir))


def stop_ids(hf_dir: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: eos of the tokenizer, and of generation_config.json or else config.json."""
    ids = {tokenizer.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        path = hf_dir / file
        if path.is_file():
            value = read_json(path, _Stops).eos_token_id
            ids |= set(value) if isinstance(value, list) else {value}
            break
    return tuple(sorted(i for i in ids if i is not None))
