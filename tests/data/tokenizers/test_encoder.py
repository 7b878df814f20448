"""Encoders: byte lengths against offsets, gigatoken against HF, and the choice between them."""

from __future__ import annotations

import builtins
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from mrlhf.data.tokenizers.encoder import PROBES, Encoder, byte_lengths, choose_encoder, trained_mask
from mrlhf.data.tokenizers.vocabulary import load_tokenizer
from mrlhf.errors import DataError, EnvironmentProblem, RowProblem

from ..chat_templates import SPECIAL

PARTS = [*PROBES, *SPECIAL, "that", " the", "naïve", "東京", "🙂", "👩\u200d👧", "\n"]


def random_texts(number: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choice(PARTS) for _ in range(rng.randrange(12))) for _ in range(number)]


def random_spans(text: str, rng: random.Random) -> list[tuple[int, int]]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(2 * rng.randrange(4)))
    return [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if a < b]


def variant(tokenizer: Any, change: Callable[[Any], None]) -> Any:
    """A tokenizer with something changed in its backend."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    change(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:]
    )


def nfc(backend: Any) -> None:
    backend.normalizer = normalizers.NFC()


def untrimmed_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None  # GPT-2's leaves blanks out of the offsets
    encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


@pytest.mark.parametrize("kind", ["bpe", "merging", "nfc"])
@pytest.mark.parametrize("backend", ["hf", "gigatoken"])
def test_masks_from_byte_lengths_are_those_from_offsets(kind: str, backend: Any, tokenizers: dict[str, Any]) -> None:
    tokenizer = variant(tokenizers["bpe"], nfc) if kind == "nfc" else tokenizers[kind]
    encoder = Encoder(tokenizer, backend if kind != "merging" else "hf")
    rng = random.Random(1)
    texts = random_texts(400)
    spans = [random_spans(t, rng) for t in texts]
    assert encoder.byte_lengths() is not None
    split = 0
    for text, span, (ids, mask) in zip(texts, spans, encoder.masked(texts, spans), strict=True):
        expected, offsets = untrimmed_offsets(tokenizer, text)
        assert ids.tolist() == expected and ids.dtype == np.int32 and mask.dtype == np.uint8
        assert mask.tolist() == trained_mask(offsets, span).tolist(), (text, span)
        split += sum(a == b for a, b in zip(offsets, offsets[1:], strict=False))
    assert split > 100  # characters cut over several tokens were among them


def test_byte_lengths_are_the_bytes_that_tokens_decode_to(tokenizers: dict[str, Any]) -> None:
    lengths = Encoder(tokenizers["bpe"]).byte_lengths()
    assert lengths is not None and len(lengths) == len(tokenizers["bpe"])
    for text in (t for t in random_texts(100) if t):
        ids = tokenizers["bpe"](text, add_special_tokens=False)["input_ids"]
        assert lengths[ids].sum() == len(text.encode())


def test_where_bytes_do_not_tell_offsets_are_used(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def prefix(backend: Any) -> None:
        state = backend.to_str().replace('"add_prefix_space":false', '"add_prefix_space":true')
        backend.pre_tokenizer = Tokenizer.from_str(state).pre_tokenizer

    for unfit in (
        variant(tokenizers["bpe"], prefix),
        tokenizers["unigram"],
        tokenizers["wordpiece"],
        tokenizers["sentencepiece bpe"],
    ):
        assert Encoder(unfit).byte_lengths() is None
    for change in (
        lambda b: setattr(b, "normalizer", normalizers.NFKC()),
        lambda b: setattr(b, "normalizer", normalizers.Lowercase()),
    ):
        assert Encoder(variant(tokenizers["bpe"], change)).byte_lengths() is None

    # a text whose normal form is another, and a special token that takes the blanks around it:
    # only these go the long way
    greedy = variant(tokenizers["bpe"], nfc)
    greedy.add_special_tokens({"additional_special_tokens": [AddedToken("<greedy>", lstrip=True, special=True)]})
    encoder = Encoder(greedy)
    texts = ["plain that", "cafe\u0301 that", "x   <greedy> that", "café"]
    long_way: list[str] = []
    original = encoder._by_offsets

    def watch(given: Any, spans: Any, guarded: bool) -> Any:
        long_way.extend(given)
        return original(given, spans, guarded)

    monkeypatch.setattr(encoder, "_by_offsets", watch)
    for text, (ids, mask) in zip(texts, encoder.masked(texts, [[(len(t) - 4, len(t))] for t in texts]), strict=True):
        assert greedy.decode(ids[mask == 1].tolist()).strip() == text[-4:]
    assert long_way == ["cafe\u0301 that", "x   <greedy> that"]


def test_gigatoken_gives_hfs_ids_in_both_modes(tokenizers: dict[str, Any]) -> None:
    for tokenizer in (tokenizers["bpe"], variant(tokenizers["bpe"], nfc)):
        encoder, note = choose_encoder(tokenizer, "auto", random_texts(300))
        assert encoder.name == "gigatoken" and "equal to hf on" in note
        hf = Encoder(tokenizer)
        for guarded in (False, True):
            for one, two in zip(
                hf.ids(random_texts(600), guarded=guarded), encoder.ids(random_texts(600), guarded=guarded), strict=True
            ):
                assert np.array_equal(one, two) and two.dtype == np.int32
        assert encoder.ids([]) == [] and encoder.ids([""])[0].tolist() == []


def test_gigatoken_is_refused_with_the_reason(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    merging = tokenizers["merging"]  # has no borders between words, which gigatoken takes for GPT-2's
    encoder, note = choose_encoder(merging, "auto", [])
    assert encoder.name == "hf" and "it differs on 'a  b   c    d' at token" in note
    with pytest.raises(DataError, match="cannot stand in for this tokenizer: it differs on") as caught:
        choose_encoder(merging, "gigatoken", [])
    assert caught.value.fix == "--tokenizer-backend hf"
    for kind in ("unigram", "wordpiece", "sentencepiece bpe"):
        encoder, note = choose_encoder(tokenizers[kind], "auto", [])
        assert encoder.name == "hf" and "no character offsets" in note
        encoder, note = choose_encoder(tokenizers[kind], "auto", [], masks=False)
        assert encoder.name == "gigatoken" or "refused" in note
    assert choose_encoder(tokenizers["bpe"], "hf", [])[0].name == "hf"

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gigatoken":
            raise ModuleNotFoundError("No module named 'gigatoken'")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    assert "not installed" in choose_encoder(tokenizers["bpe"], "auto", [])[1]
    with pytest.raises(EnvironmentProblem, match="not installed"):
        choose_encoder(tokenizers["bpe"], "gigatoken", [])


def test_a_difference_in_the_input_itself_is_found(tokenizers: dict[str, Any]) -> None:
    """gigatoken is compared on the input's own texts: make it wrong about one word."""
    from mrlhf.data.tokenizers import encoder as module

    class Wrong(module.GigatokenBackend):
        def ids(self, texts: Any) -> Any:
            return super().ids([t.replace("zyx", "zxy") for t in texts])

    original = module.GigatokenBackend
    module.GigatokenBackend = Wrong  # type: ignore[misc]
    try:
        assert choose_encoder(tokenizers["bpe"], "auto", ["abc"])[0].name == "gigatoken"
        encoder, note = choose_encoder(tokenizers["bpe"], "auto", ["abc", "say zyx"])
        assert encoder.name == "hf" and "differs on 'say zyx'" in note
        assert (
            choose_encoder(tokenizers["bpe"], "auto", ["abc", "say zyx"], verify=1)[0].name == "gigatoken"
        )  # only the first is looked at
        assert "unverified" in choose_encoder(tokenizers["bpe"], "gigatoken", ["say zyx"], verify=0)[1]
    finally:
        module.GigatokenBackend = original  # type: ignore[misc]


@pytest.mark.parametrize("backend", ["hf", "gigatoken"])
def test_encoders_can_be_pickled(backend: Any, tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(tokenizers["bpe"], backend)
    texts = random_texts(50)
    before = encoder.masked(texts, [[(0, 3)] for _ in texts])
    again = pickle.loads(pickle.dumps(encoder)).masked(texts, [[(0, 3)] for _ in texts])
    assert all(np.array_equal(a, b) for x, y in zip(before, again, strict=True) for a, b in zip(x, y, strict=True))


def test_what_other_callers_set_on_the_tokenizer_does_not_matter(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bpe"]
    encoder = Encoder(tokenizer)
    expected = encoder.ids(["<|im_end|> that is it"])[0].tolist()
    tokenizer(
        ["<|im_end|> that is it"], split_special_tokens=True, truncation=True, max_length=2, return_offsets_mapping=True
    )
    assert encoder.ids(["<|im_end|> that is it"])[0].tolist() == expected


@pytest.mark.parametrize("backend", ["hf", "gigatoken"])
def test_half_a_character_is_a_row_problem(backend: Any, tokenizers: dict[str, Any]) -> None:
    encoder = Encoder(tokenizers["bpe"], backend)
    for call in (lambda: encoder.ids(["a\ud800b"]), lambda: encoder.masked(["ok", "a\ud800b"], [[], []])):
        with pytest.raises(RowProblem, match="half of a UTF-16 pair"):
            call()


def test_byte_lengths_of_an_unknown_token_fail_the_sum() -> None:
    tree = {
        "model": {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "Ġb": 2, "東": 3}, "unk_token": "<unk>"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "normalizer": None,
        "added_tokens": [{"id": 0, "content": "<unk>"}, {"id": 5, "content": "é"}],
    }
    lengths = byte_lengths(tree)
    assert lengths is not None and lengths.tolist() == [0, 1, 2, 0, 0, 2]


def test_characters_newer_than_a_unicode_table_are_left_to_hf(bpe_dir: str) -> None:
    """Seen on real text: letters of newer Unicode versions, and marks that older tables do not reorder."""
    tokenizer = load_tokenizer(bpe_dir)
    texts = ['"\ua7cf", "\U00016ebc"', "\u07eb-\u07fd\u07f3\u0816", "plain é 🙂"]
    plain, fast = Encoder(tokenizer), Encoder(tokenizer, "gigatoken")
    assert [fast._is_doubtful(t) for t in texts][0] and not fast._is_doubtful(texts[2])
    for ours, theirs in zip(fast.ids(texts), plain.ids(texts), strict=True):
        assert ours.tolist() == theirs.tolist()
    for (ours, _), (theirs, _) in zip(fast.masked(texts, [[]] * 3), plain.masked(texts, [[]] * 3), strict=True):
        assert ours.tolist() == theirs.tolist()
