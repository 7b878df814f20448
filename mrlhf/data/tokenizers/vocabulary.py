"""Tokenizers from directories and files: loading, their size, their fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from mrlhf.data.tokenizers.encoder import PROBES
from mrlhf.data.tokenizers.rank_file import from_ranks
from mrlhf.data.tokenizers.sentencepiece_model import from_sentencepiece
from mrlhf.errors import DataError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_CONFIGURATIONS = ("tokenizer_config.json", "config.json")
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_FINGERPRINT_PROBE = (
    "The quick brown fox, 1234567 times:\n\tdéjà vu 東京 🙂  <s></s><|im_start|> don't  \n\n  x = [1.5e-3];"
)


def load_tokenizer(path: str | Path) -> Any:
    """The fast HF tokenizer of a directory, a hub id, or a bare sentencepiece .model or .tiktoken file.

    Runs no code from there. Slow tokenizers are converted where transformers can, and must give the same ids on probe
    texts. Raises DataError.
    """
    path = str(path)
    tokenizer = _bare_file(path) if os.path.isfile(path) else _of_directory(path)
    # lengths are checked against --seq-length; HF's own warning would only repeat for every sample
    tokenizer.model_max_length = 1 << 60
    return tokenizer if tokenizer.is_fast else _converted(tokenizer)


def _of_directory(path: str) -> Any:
    """The tokenizer of a directory or a hub id."""
    if not os.path.isdir(path):
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise DataError("no such file or directory", where=path,
                            expected="a directory with tokenizer.json, or a .model file", fix="--tokenizer DIR")
        return _of_transformers(path)
    files = os.listdir(path)
    for file in (os.path.join(path, name) for name in files):
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            # transformers would wait for the writer of a pipe, and read a device for ever
            raise DataError("neither a file nor a directory", where=file, expected="a tokenizer's files",
                            fix="remove it")
    models = [f for f in files if f.endswith((".model", ".tiktoken"))]
    if not models and not {*_VOCABULARIES} & {*files}:
        # transformers would make up an empty tokenizer from the model's type
        raise DataError("no tokenizer files", where=path, expected="a directory with tokenizer.json",
                        fix="copy the model's tokenizer there")
    if not {*_VOCABULARIES, *_CONFIGURATIONS} & {*files}:  # transformers would guess the rest
        return _bare_file(os.path.join(path, models[0]))
    tokenizer = _of_transformers(path)
    if "tokenizer.model" in files and "tokenizer.json" not in files and type(tokenizer).__name__ in _GENERIC:
        _check_guess(tokenizer, path)
    if "tokenizer.json" in files and tokenizer.is_fast:
        _check_rebuilt(tokenizer, path)
    return tokenizer


def _of_transformers(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # what a foreign tokenizer.json makes of transformers and tokenizers has no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load a tokenizer: {reason}", where=path, expected="a directory with tokenizer.json",
                        fix="--tokenizer DIR") from error


def _check_rebuilt(tokenizer: Any, path: str) -> None:
    """transformers rebuilds tokenizer.json by the model_type in config.json: refuse where that lost the vocabulary."""
    from tokenizers import Tokenizer

    plain = "The quick brown fox, 1234567 times"
    if not tokenizer(plain, add_special_tokens=False)["input_ids"]:
        exact = Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
        if exact.encode(plain, add_special_tokens=False).ids:
            what = f"transformers makes a {type(tokenizer).__name__} of tokenizer.json that gives no ids for a text"
            raise DataError(what, where=path,
                            expected="a tokenizer of the kind that model_type in config.json stands for",
                            fix="the model's own tokenizer files, or a directory of the tokenizer's files alone")


def _check_guess(tokenizer: Any, path: str) -> None:
    """transformers read a sentencepiece model without knowing the model's class: refuse where that changed the ids."""
    exact = _bare_file(os.path.join(path, "tokenizer.model"))
    difference = _first_difference(exact, tokenizer)
    if difference is not None:
        raise DataError(f"transformers does not read this sentencepiece model exactly: {difference}", where=path,
                        expected="tokenizer.json, or the model's tokenizer_class in tokenizer_config.json",
                        fix=f"--tokenizer {shlex.quote(exact.name_or_path)}, the bare model, or add the "
                        "tokenizer_class")


def _first_difference(reference: Any, tokenizer: Any) -> str | None:
    """The first of PROBES that `tokenizer` encodes otherwise than `reference`, in words; None where there is none."""
    for text in PROBES:
        expected, ids = (each(text, add_special_tokens=False)["input_ids"] for each in (reference, tokenizer))
        if expected != ids:
            return f"{text[:40]!r} becomes {ids[:8]}, not {expected[:8]}"
    return None


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
    """The fast tokenizer that transformers makes of `slow`, which reports no character offsets for the masks."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    name = type(slow).__name__
    help_texts = {"where": slow.name_or_path, "expected": "a fast tokenizer (tokenizer.json)",
                  "fix": "a model with a fast tokenizer (tokenizer.json)"}
    try:
        backend = convert_slow_tokenizer(slow)
    except (ValueError, KeyError, AttributeError, TypeError, OSError, ImportError) as error:
        what = f"{name} is a slow tokenizer and transformers cannot convert it"
        raise DataError(f"{what}: it reports no character offsets, which masks are made from", **help_texts) from error
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=slow.name_or_path,
                                   chat_template=slow.chat_template, **slow.special_tokens_map)
    fast.model_max_length = slow.model_max_length
    difference = _first_difference(slow, fast)
    if difference is not None:
        what = f"transformers' conversion of {name} to a fast tokenizer is not exact"
        raise DataError(f"{what}: {difference}", **help_texts)
    return fast


def vocab_size(tokenizer: Any) -> int:
    """Smallest size that covers every id (ids of added tokens may leave gaps)."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_fingerprint(tokenizer: str | Any) -> str:
    """SHA-256 over all that decides the ids: vocabulary, merges, added tokens, bos/eos and the ids of a probe text.

    Takes a directory or a loaded tokenizer. Saving and loading keeps it; it does not depend on the chat template, the
    padding token or the layout of the files.
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
