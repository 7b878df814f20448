"""A bare tiktoken file (NAME.tiktoken) as a fast HF tokenizer, for the encodings whose name determines the rest.

transformers 5.19.0 cannot replace this. AutoTokenizer finds no tokenizer in a directory with NAME.tiktoken; it reads
ranks from tokenizer.model and tiktoken.model alone, and only with the tiktoken package. It then cuts every text by the
pattern of cl100k_base, numbers special tokens from tokenizer_config.json or not at all, sets no eos, and does not
notice missing ranks. Its TikTokenConverter, given ranks and pattern, builds the right merges and is used below.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, NamedTuple

from mrlhf.errors import DataError


class Encoding(NamedTuple):
    """The parts of an encoding that its file does not hold: number of ranks, pattern that cuts text, special tokens."""

    ranks: int
    pattern: str
    special: dict[str, int]


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS = {
    "r50k_base": Encoding(
        50256, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", {"<|endoftext|>": 50256}
    ),
    "cl100k_base": Encoding(
        100256,
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS,
        {"<|endoftext|>": 100257, **_FIM, "<|endofprompt|>": 100276},
    ),
    "o200k_base": Encoding(
        199998,
        f"{_LOWER}|{_UPPER}" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS,
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


def from_ranks(path: str) -> Any:
    """The tokenizer of a rank file. Raises DataError where its name is none of ENCODINGS or ranks are missing."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = ENCODINGS.get(Path(path).name.removesuffix(".tiktoken"))
    if encoding is None:
        raise DataError(
            "a tiktoken file holds token ranks only: not how text is cut into words, nor the special tokens",
            where=path, expected=f"a directory with tokenizer.json, or {'.tiktoken, '.join(ENCODINGS)}.tiktoken",
            fix="transformers.integrations.tiktoken.convert_tiktoken_to_fast(ENCODING, DIR), then --tokenizer DIR"
        )
    ranks = _read(path)
    if len(ranks) != encoding.ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{len(ranks):,} ranks", where=path, expected=f"{encoding.ranks:,}, numbered from 0",
                        fix="copy the file again")

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks  # transformers would want the tiktoken package for this

    backend = Converter(path, pattern=encoding.pattern).converted()
    names = {i: token for token, i in encoding.special.items()}
    # ids that the encoding leaves free get a name, because the tokenizers library numbers added tokens without gaps
    every = [names.get(i, f"<|unused_{i}|>") for i in range(encoding.ranks, max(names) + 1)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in every])
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=path, eos_token="<|endoftext|>")


def _read(path: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError) as error:
            raise DataError("not a line of a tiktoken file", where=f"{path}:{number}",
                            expected="a token in base64 and its rank", fix="copy the file again") from error
    return ranks
