"""Tokenizers from directories and files: loading, their size, their fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

from mrlhf.data.tokenizers.encoder import PROBES
from mrlhf.data.tokenizers.rank_file import from_ranks
from mrlhf.data.tokenizers.sentencepiece_model import from_sentencepiece
from mrlhf.errors import DataError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_CONFIGURATIONS = ("tokenizer_config.json", "config.json")
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_FINGERPRINT_PROBE = "The quick brown fox, 1234567 times:\n\tdéjà vu 東京 🙂  <s></s><|im_start|> don't  \n\n  x = [1.5e-3];"


def load_tokenizer(path: str) -> Any:
    """The fast HF tokenizer in directory `path` (or hub id), or of a bare sentencepiece .model or .tiktoken file. Never runs code from it.

    Slow tokenizers are converted where transformers knows how, and must give the same ids on probe texts. Raises DataError.
    """
    here = os.listdir(path) if os.path.isdir(path) else []
    if os.path.isfile(path):
        tokenizer = _bare_file(path)
    elif not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise DataError("no such file or directory", where=path,
                        expected="a directory with tokenizer.json, or a .model file", fix="--tokenizer DIR")
    elif here and not any(f in _VOCABULARIES or f.endswith((".model", ".tiktoken")) for f in here) or os.path.isdir(path) and not here:
        # transformers would make up an empty tokenizer from the model's type
        raise DataError("no tokenizer files", where=path, expected="a directory with tokenizer.json",
                        fix="copy the model's tokenizer there")
    elif here and not any(f in (*_VOCABULARIES, *_CONFIGURATIONS) for f in here):
        # only a model: transformers would guess the rest of it
        tokenizer = _bare_file(os.path.join(path, next(f for f in here if f.endswith((".model", ".tiktoken")))))
    else:
        tokenizer = _of_transformers(path)
        if "tokenizer.model" in here and "tokenizer.json" not in here and type(tokenizer).__name__ in _GENERIC:
            _check_guess(tokenizer, path)
    tokenizer.model_max_length = 1 << 60  # lengths are checked against --seq-length; HF's own warning would only repeat for every sample
    return tokenizer if tokenizer.is_fast else _converted(tokenizer)


def _of_transformers(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load a tokenizer: {reason}", where=path, expected="a directory with tokenizer.json",
                        fix="--tokenizer DIR") from error


def _check_guess(tokenizer: Any, path: str) -> None:
    """transformers read a sentencepiece model without knowing the model's class: refuse where that changed the ids."""
    exact = _bare_file(os.path.join(path, "tokenizer.model"))
    for text in PROBES:
        if (found := tokenizer(text, add_special_tokens=False)["input_ids"]) != exact(
            text, add_special_tokens=False
        )["input_ids"]:
            raise DataError(
                f"transformers does not read this sentencepiece model exactly: {text[:40]!r} becomes {found[:8]}",
                where=path, expected="tokenizer.json, or the model's tokenizer_class in tokenizer_config.json",
                fix=f"--tokenizer {os.path.join(path, 'tokenizer.model')} (the bare model), or add the tokenizer_class"
            )


def _bare_file(path: str) -> Any:
    with open(path, "rb") as file:
        first = file.readline(200)
    if _RANK_LINE.fullmatch(first):
        return from_ranks(path)
    if not path.endswith(".model"):
        raise DataError("not a tokenizer", where=path, expected="a directory with tokenizer.json, or a .model file",
                        fix="--tokenizer DIR")
    return from_sentencepiece(path)


def _converted(slow: Any) -> Any:
    """The fast tokenizer that transformers makes of `slow`: masks are made from character offsets, which slow ones do not report."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    name = type(slow).__name__
    fix = "a model with a fast tokenizer (tokenizer.json)"
    try:
        backend = convert_slow_tokenizer(slow)
    except (ValueError, KeyError, AttributeError, TypeError, OSError, ImportError) as error:
        raise DataError(
            f"{name} is a slow tokenizer and transformers cannot convert it: it reports no character offsets, which masks are made from",
            where=slow.name_or_path,
            expected="a fast tokenizer (tokenizer.json)",
            fix=fix,
        ) from error
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=slow.name_or_path,
                                   chat_template=slow.chat_template, **slow.special_tokens_map)
    fast.model_max_length = slow.model_max_length
    for text in PROBES:
        expected, found = slow(text, add_special_tokens=False)["input_ids"], fast(
            text, add_special_tokens=False
        )["input_ids"]
        if expected != found:
            raise DataError(
                f"transformers' conversion of {name} to a fast tokenizer is not exact: {text[:40]!r} becomes {found[:8]}, not {expected[:8]}",
                where=slow.name_or_path,
                expected="a fast tokenizer (tokenizer.json)",
                fix=fix,
            )
    return fast


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
