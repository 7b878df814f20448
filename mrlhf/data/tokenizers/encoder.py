"""Texts -> token ids, and masks from character spans. Two backends: HF tokenizers, and gigatoken where it proves equal.

Byte-level BPE cuts the bytes of a text into consecutive tokens, so the number of bytes of each id gives the place of
each token: one cumulative sum for a whole batch. Where the sum differs from the length of the text, and for other kinds
of tokenizers, HF's character offsets are used.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, Literal, Protocol

import numpy as np

from mrlhf.data.tokenizers.special import Rendered, Span, SpecialTokens, special_tokens
from mrlhf.errors import DataError, EnvironmentProblem, RowProblem

# Words whose tokens BPE remembers. The default cache of 10,000 fills up and never changes: 3-9 % slower on real text.
_CACHED_WORDS = 100_000
BackendName = Literal["auto", "hf", "gigatoken"]


class Backend(Protocol):
    def ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 of all texts one after another, and how many each has (int64 [len(texts)])."""


class HfBackend:
    """A `tokenizers.Tokenizer`, called without the layers that transformers puts around it."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if tokenizer.model.__class__.__name__ in ("BPE", "Unigram"):
            tokenizer.model._resize_cache(_CACHED_WORDS)

    def _ready(self) -> Any:
        """The tokenizer without truncation, padding and the like, which calls of transformers may have left set."""
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = False
        return self.tokenizer

    def ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        per_text = [e.ids for e in self._ready().encode_batch_fast(list(texts), add_special_tokens=False)]
        counts = np.fromiter(map(len, per_text), np.int64, len(per_text))
        return np.fromiter(chain.from_iterable(per_text), np.int32, int(counts.sum())), counts

    def offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text, ids int32 [T] and the characters [start, end) of every token, int64 [T, 2]."""
        encodings = self._ready().encode_batch(list(texts), add_special_tokens=False)
        return [(np.asarray(e.ids, dtype=np.int32),
                 np.fromiter(chain.from_iterable(e.offsets), np.int64, 2 * len(e)).reshape(-1, 2))
                for e in encodings]


class GigatokenUnfit(DataError):
    """gigatoken cannot read this tokenizer, or encode with it, or gives other ids."""


class GigatokenBackend:
    """gigatoken on the same tokenizer.json, in one thread.

    Raises GigatokenUnfit where it fails, ModuleNotFoundError where it is not installed.
    """

    def __init__(self, state: str):
        from gigatoken import Tokenizer

        self.tokenizer: Any = self._call(lambda: Tokenizer.from_json(state))

    def ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        layout = self._call(lambda: self.tokenizer.encode_batch(list(texts), parallel=False)).layout
        bounds = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[bounds[0] : bounds[-1]].astype(np.int32), np.diff(bounds)

    @staticmethod
    def _call(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in its Rust code is no Exception
            reason = str(error).strip().splitlines()
            raise GigatokenUnfit(f"gigatoken fails: {reason[0] if reason else type(error).__name__}",
                                 fix="--tokenizer-backend hf") from error


class Encoder:
    """The encoder of one tokenizer (fast, HF). Can be pickled; the receiver builds the backends again.

    `guarded` texts come from SpecialTokens.guard: markers stand for special tokens, all other text is plain.
    """

    def __init__(self, tokenizer: Any, backend: Literal["hf", "gigatoken"] = "hf"):
        self.tokenizer, self.name = tokenizer, backend
        self.special = SpecialTokens(special_tokens(tokenizer))
        self._backends: dict[tuple[str, bool], Any] = {}
        self._lengths: dict[bool, np.ndarray | None] = {}
        self._exact: bool | None = None
        self._normal = json.loads(self._state(guarded=False))["normalizer"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backends": {}}

    def _state(self, *, guarded: bool) -> str:
        state = self.tokenizer.backend_tokenizer.to_str()
        return guarded_state(state, self.special.guards) if guarded else state

    def _backend(self, name: str, guarded: bool) -> Any:
        key = (name, guarded)
        if key not in self._backends:
            if name == "gigatoken":
                self._backends[key] = GigatokenBackend(self._state(guarded=guarded))
            elif guarded:
                from tokenizers import Tokenizer

                self._backends[key] = HfBackend(Tokenizer.from_str(self._state(guarded=True)))
            else:
                self._backends[key] = HfBackend(self.tokenizer.backend_tokenizer)
        return self._backends[key]

    @property
    def guards_exactly(self) -> bool:
        """Whether guarded texts get the ids that the tokenizer gives to the same text with special tokens."""
        if self._exact is None:
            tokens = sorted(self.special.guards)[:8]
            text = "".join(f"{t}user\nHello there{t}\nWhy, yes{t} 1é🙂 {t}{t}" for t in tokens)
            guarded, _ = self.special.guard(Rendered(text))
            bare = [self.ids([t], guarded=True)[0].tolist() for t in tokens]
            known = {*self.tokenizer.convert_tokens_to_ids(tokens)} - {self.tokenizer.unk_token_id}
            expected, ids_of_guarded = self.ids([text])[0], self.ids([guarded], guarded=True)[0]
            self._exact = np.array_equal(expected, ids_of_guarded) and not any(known & set(ids) for ids in bare)
        return self._exact

    def byte_lengths(self, *, guarded: bool = False) -> np.ndarray | None:
        """Bytes of text behind every id (int32 [V]); None where the tokens do not cut the bytes of the text."""
        if guarded not in self._lengths:
            self._lengths[guarded] = byte_lengths(json.loads(self._state(guarded=guarded)))
        return self._lengths[guarded]

    def ids(self, texts: Sequence[str], *, guarded: bool = False) -> list[np.ndarray]:
        """int32 [T] of each text, without the tokenizer's bos and eos. Raises RowProblem for broken unicode."""
        for text in texts:
            _size(text)
        ids_of = _split(*self._backend(self.name, guarded).ids(texts))
        again = [i for i, text in enumerate(texts) if self._is_doubtful(text)] if self.name != "hf" else []
        for i, ids in zip(again, _split(*self._backend("hf", guarded).ids([texts[i] for i in again])) if again else (),
                          strict=True):
            ids_of[i] = ids
        return ids_of

    def _is_doubtful(self, text: str) -> bool:
        """Whether Unicode tables of different years may treat the text differently; HF then encodes it."""
        if text.isascii():
            return False
        return (self._normal is not None and not unicodedata.is_normalized("NFC", text)) or _has_unassigned(text)

    def masked(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, guarded: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [T], mask uint8 [T]) of each text; mask: 1 where a token covers a character of its spans."""
        sizes = np.fromiter(map(_size, texts), np.int64, len(texts))
        lengths = self.byte_lengths(guarded=guarded)
        if lengths is None:
            return self._by_offsets(texts, spans, guarded)
        flat, counts = self._backend(self.name, guarded).ids(texts)
        mask, sums = _mask_of_bytes(flat, counts, lengths, [_in_bytes(t, s) for t, s in zip(texts, spans, strict=True)])
        results = list(zip(_split(flat, counts), _split(mask, counts), strict=True))
        inexact = sums != sizes
        if self._normal is not None or self.name != "hf":
            inexact |= np.fromiter(map(self._is_doubtful, texts), bool, len(texts))
        again = np.flatnonzero(inexact).tolist()
        for i, result in zip(again, self._by_offsets([texts[i] for i in again], [spans[i] for i in again], guarded),
                             strict=True):
            results[i] = result
        return results

    def _by_offsets(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], guarded: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = self._backend("hf", guarded).offsets(texts)
        return [(ids, trained_mask(offsets, span)) for (ids, offsets), span in zip(encoded, spans, strict=True)]


def _has_unassigned(text: str) -> bool:
    """Whether a character has no category in Python's Unicode tables; tokenizers may disagree on newer letters."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return any(bool(_unassigned(int(plane))[codes[codes >> 16 == plane] & 0xFFFF].any())
               for plane in np.flatnonzero(np.bincount(codes >> 16)))


@lru_cache(maxsize=17)
def _unassigned(plane: int) -> np.ndarray:
    """bool [65,536]: which characters of a Unicode plane have no category."""
    return np.fromiter((unicodedata.category(chr((plane << 16) + c)) == "Cn" for c in range(1 << 16)), bool, 1 << 16)


def guarded_state(state: str, guards: dict[str, str]) -> str:
    """A tokenizer.json whose special tokens answer to the markers in `guards` only, in its vocabulary too; ids stay."""
    tree = json.loads(state)
    model = tree["model"]
    for token in tree["added_tokens"]:
        if token["special"]:
            token["content"] = guards.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {guards.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[guards.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = guards.get(model["unk_token"], model["unk_token"])
    return json.dumps(tree | {"post_processor": None, "truncation": None, "padding": None})


def byte_lengths(tree: dict[str, Any]) -> np.ndarray | None:
    """Bytes of text behind every id of a parsed tokenizer.json; None where it is no byte-level BPE of unchanged text.

    Nothing adds a byte to the text (no prefix, no normalizer but NFC, which callers check the text for), so tokens
    whose bytes sum to the text's length lie one behind the other.
    """
    model, alphabet = tree["model"], _byte_alphabet()
    if not _takes_text_as_it_is(tree):
        return None
    added = {t["id"]: len(t["content"].encode()) for t in tree["added_tokens"]}
    lengths = np.zeros(max(chain(model["vocab"].values(), added), default=-1) + 1, dtype=np.int32)
    for token, i in model["vocab"].items():
        lengths[i] = len(token) if alphabet.issuperset(token) else 0
    for i, size in added.items():
        lengths[i] = size
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        lengths[unknown] = 0
    return lengths


def _takes_text_as_it_is(tree: dict[str, Any]) -> bool:
    model, steps = tree["model"], _sequence(tree["pre_tokenizer"], "pretokenizers")
    changes = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(map(model.get, changes)):
        return False
    byte_level = [s for s in steps if s["type"] == "ByteLevel"]
    known = {s["type"] for s in steps} <= {"ByteLevel", "Split", "Digits", "Punctuation"}
    normalizers = {s["type"] for s in _sequence(tree["normalizer"], "normalizers")}
    return known and normalizers <= {"NFC"} and len(byte_level) == 1 and not byte_level[0]["add_prefix_space"]


def _sequence(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for inner in part[name] for step in _sequence(inner, name)] if part["type"] == "Sequence" else [part]


def _byte_alphabet() -> set[str]:
    """The 256 characters by which byte-level tokenizers write bytes: a printable one stands for itself."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return {chr(b) for b in printable} | {chr(256 + i) for i in range(256 - len(printable))}


def _size(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise RowProblem("surrogate",
                         f"the text holds {text[error.start]!r}, half of a UTF-16 pair, which is no character",
                         expected="valid unicode", fix="mend or remove the row") from error


def _in_bytes(text: str, spans: Sequence[Span]) -> Sequence[Span]:
    if text.isascii():
        return spans
    starts = [(len(text[:start].encode()), start, end) for start, end in spans]
    return [(at, at + len(text[start:end].encode())) for at, start, end in starts]


def _mask_of_bytes(
    flat: np.ndarray, counts: np.ndarray, lengths: np.ndarray, spans: Sequence[Sequence[Span]]
) -> tuple[np.ndarray, np.ndarray]:
    """The mask of all texts (uint8, like `flat`) and the bytes that each text's tokens cover; `spans` in bytes."""
    ends = np.cumsum(lengths[flat], dtype=np.int64)
    bounds = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(counts)])]
    limits = bounds.tolist()  # a span stays within its own text even where the tokens do not cover the whole text
    edges = np.asarray([(base + start, min(base + stop, limit))
                        for base, limit, own in zip(limits, limits[1:], spans, strict=False)
                        for start, stop in own
                        if start < stop and base + start < limit],
                       dtype=np.int64).reshape(-1, 2)
    change = np.zeros(len(flat) + 1, dtype=np.int32)
    np.add.at(change, np.searchsorted(ends, edges[:, 0], side="right"), 1)
    np.add.at(change, np.minimum(np.searchsorted(ends, edges[:, 1], side="left") + 1, len(flat)), -1)
    return (np.cumsum(change[:-1]) > 0).astype(np.uint8), np.diff(bounds)


def _split(flat: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    cuts = [0, *accumulate(counts.tolist())]
    return [flat[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def trained_mask(offsets: Sequence[Span] | np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """uint8 [T]: 1 where a token covers at least one character of a span.

    Byte-level tokenizers leave leading blanks out of a token's offsets; the token begins at the end of the one before.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    if not len(offsets) or not spans:
        return mask.astype(np.uint8)
    pairs = np.asarray(offsets, dtype=np.int64)
    end = np.maximum.accumulate(pairs[:, 1])
    begin = np.minimum(pairs[:, 0], np.concatenate([[0], end[:-1]]))
    point = begin == pairs[:, 1]  # covers no character at all: belongs to what follows
    for start, stop in spans:
        mask |= np.where(point, begin >= start, pairs[:, 1] > start) & (begin < stop)
    return mask.astype(np.uint8)


# ---- which backend -------------------------------------------------------------------------------

# Texts on which other implementations of a tokenizer have erred: runs of blanks and line ends, contractions, digits,
# combining marks, characters of one to four bytes, joined emoji, controls, right-to-left text, long runs, and parts of
# special tokens.
PROBES = (
    "", " ", "  ", "\n", "\r\n", "\n\n\n", " \n \n", "\t\tx\t", "a  b   c    d", " leading", "trailing ",
    "\u200b\ufeff\u2060",
    "x\u00a0y\u2003z\u3000", "I'll DON'T we've it'S 'Tis rock'n'roll ''''",
    "1 12 123 1234 12345678901 1,234.5e-6 ½ ² ٣ 四", "a1b22c333",
    "snake_case camelCase UPPERlower __init__", "x=[1,2];y={'a':-1}//*&^%$#@!~`", "http://a.b/c?d=e&f#g",
    "<html>&amp;</html>",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u2460 \uff21", "ǅ ß ẞ İ ı ſ", "naïve café Zürich", "мир и дружба",
    "שלום עולם", "مرحبا بالعالم",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "東京都へようこそ。", "안녕하세요", "🙂🙃", "👩\u200d👩\u200d👧 🇩🇪 👍🏽",
    "\U0001f9ff𝔘𝔫𝔦", "\x00\x01\x1b[0m\x7f\x85",
    "\ud7ff\ue000\ufffd\U0010ffff", "a" * 200, "ab" * 100, " " * 100, "\n" * 50, "🙂" * 30, "aaaaab " * 20,
    "<", "<|", "|>", "<|im_", "_end|>", "<s", "[INST", "<0x0A>", "▁x ▁▁",
)
_BEFORE, _BEHIND = ("", " ", "x", "x \n", "é"), ("", " ", "  y", "\n", "y", "\n\nz", "'s", "1")
MOST_CHARACTERS = 1_500_000


def choose_encoder(tokenizer: Any, backend: BackendName, sample_texts: Sequence[str], *, verify: int = 2000,
                   masks: bool = True) -> tuple[Encoder, str]:
    """The encoder to use, and a line that says why.

    gigatoken is used where it gives HF's ids for PROBES (also around special tokens) and for the first `verify` of
    `sample_texts` (of the input; at most MOST_CHARACTERS). Otherwise `auto` falls back to HF, and `gigatoken` raises
    DataError with the first text that differs. `verify` 0 skips the comparison. `masks`: the caller will ask for masks.
    Raises EnvironmentProblem where `backend` is gigatoken and it is not installed.
    """
    plain = Encoder(tokenizer)
    if backend == "hf":
        return plain, "tokenizer backend hf (--tokenizer-backend hf)"
    encoder = Encoder(tokenizer, "gigatoken")
    try:
        if masks and encoder.byte_lengths() is None:
            raise GigatokenUnfit(
                "it gives no character offsets, and this tokenizer is not byte-level BPE that takes text as it is"
            )
        checked = _compare(encoder, plain, sample_texts, verify)
    except ModuleNotFoundError as error:
        if backend == "gigatoken":
            raise EnvironmentProblem("gigatoken is not installed",
                                     fix="pip install 'mrlhf[data]', or --tokenizer-backend hf") from error
        return plain, "tokenizer backend hf: gigatoken is not installed (pip install 'mrlhf[data]')"
    except GigatokenUnfit as error:
        if backend == "gigatoken":
            raise DataError(f"gigatoken cannot stand in for this tokenizer: {error.what}", where=tokenizer.name_or_path,
                            fix="--tokenizer-backend hf") from error
        return plain, f"tokenizer backend hf: gigatoken was refused, {error.what}"
    return encoder, "tokenizer backend gigatoken, " + (f"equal to hf on {checked:,} texts"
                                                       if verify else "unverified (--verify-tokens 0)")


def _compare(encoder: Encoder, plain: Encoder, sample_texts: Sequence[str], verify: int) -> int:
    """On how many texts the two are equal. Raises GigatokenUnfit where they are not."""
    checked = 0
    for guarded in (False, True):
        tokens = list(plain.special.guards.values() if guarded else plain.special.guards)
        probes = [*PROBES, *tokens, *(f"{a}{t}{b}{t}" for t in tokens[:6] for a in _BEFORE for b in _BEHIND)]
        sample = _at_most(sample_texts[:verify], MOST_CHARACTERS)
        texts = [*probes, *(sample if not guarded else filter(plain.special.occurs_in, sample))] if verify else [""]
        pairs = zip(plain.ids(texts, guarded=guarded), encoder.ids(texts, guarded=guarded), strict=True)
        for text, (expected, ids) in zip(texts, pairs, strict=True):
            if not np.array_equal(expected, ids):
                at = next((i for i, (a, b) in enumerate(zip(expected, ids, strict=False)) if a != b),
                          min(len(expected), len(ids)))
                shown = text if len(text) <= 60 else text[:60] + "..."
                both = f"{ids[at : at + 4].tolist()}, hf {expected[at : at + 4].tolist()}"
                raise GigatokenUnfit(f"it differs on {shown!r} at token {at}: {both}")
        checked += len(texts)
    return checked


def _at_most(texts: Sequence[str], characters: int) -> list[str]:
    """The first texts, cut where their sum passes `characters`."""
    kept: list[str] = []
    for text in texts:
        if characters <= 0:
            break
        kept.append(text[:characters])
        characters -= len(text)
    return kept
