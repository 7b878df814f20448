"""Tokenizers from directories and files: loading, their size, their fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from mrlhf.errors import DataError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_FINGERPRINT_PROBE = "The quick brown fox, 1234567 times:\n\tdéjà vu 東京 🙂  <s></s><|im_start|> don't  \n\n  x = [1.5e-3];"


def load_tokenizer(path: str) -> Any:
    """The HF tokenizer in directory `path` (or hub id). Never runs code from it. Raises DataError."""
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise DataError("no such directory", where=path, expected="a directory with tokenizer.json", fix="--tokenizer DIR")
    if os.path.isdir(path) and not any(f in _VOCABULARIES or f.endswith((".model", ".tiktoken")) for f in os.listdir(path)):
        # transformers would make up an empty tokenizer from the model's type
        raise DataError("no tokenizer files", where=path, expected="a directory with tokenizer.json", fix="copy the model's tokenizer there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load a tokenizer: {reason}", where=path, expected="a directory with tokenizer.json", fix="--tokenizer DIR"
        ) from error
    tokenizer.model_max_length = 1 << 60  # lengths are checked against --seq-length; HF's own warning would only repeat for every sample
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """Smallest size that covers every id (ids of added tokens may leave gaps)."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_fingerprint(tokenizer: str | Any) -> str:
    """SHA-256 over what decides the ids: vocabulary, merges, added tokens, bos/eos and the ids of a probe text.

    Takes a directory or a loaded tokenizer. Saving and loading again keeps it; the chat template, the padding token and the
    files' layout do not enter.
    """
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    merges: list[Any] = []
    if loaded.is_fast:
        merges = json.loads(loaded.backend_tokenizer.to_str())["model"].get("merges") or []
    parts = {
        "vocab": sorted(loaded.get_vocab().items()),
        "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "added": sorted((i, t.content, bool(t.special)) for i, t in loaded.added_tokens_decoder.items()),
        "ends": [loaded.bos_token, loaded.eos_token],
        "probe": loaded(_FINGERPRINT_PROBE, add_special_tokens=False)["input_ids"],
    }
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()
