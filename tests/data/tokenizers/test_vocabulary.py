"""Tokenizers that are not a directory with tokenizer.json: bare sentencepiece models, slow tokenizers, rank files."""

from __future__ import annotations

import base64
import importlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mrlhf.data.prepare.template import Template, tokenizer_fingerprint
from mrlhf.data.tokenizers.encoder import PROBES
from mrlhf.data.tokenizers.rank_file import ENCODINGS
from mrlhf.data.tokenizers.vocabulary import load_tokenizer, vocab_size
from mrlhf.errors import DataError

WORDS = [
    "that",
    "the quick",
    "robot",
    "naïve",
    "東京",
    "🙂",
    "1, 2",
    "  ",
    "\n",
    "\t",
    " ",
    "\u3000",
    "½",
    "ﬁ",
    "(x)",
    "e\u0301",
    "qz",
    "мир",
    "<0x0A>",
    "▁",
]


@pytest.mark.parametrize("kind", ["unigram", "bpe", "unigram_bytes", "bpe_bytes"])
def test_bare_sentencepiece_models_give_sentencepieces_ids(kind: str, sentencepiece_files: dict[str, str]) -> None:
    import sentencepiece

    path = sentencepiece_files[kind]
    original = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = load_tokenizer(path)
    rng = random.Random(5)
    for _ in range(500):
        text = "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text), text
        if kind.endswith("_bytes"):
            assert tokenizer.decode(ids) == original.decode(ids)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.eos_token_id == original.eos_id() and vocab_size(tokenizer) == original.vocab_size()
    assert tokenizer_fingerprint(str(Path(path).parent)) == tokenizer_fingerprint(
        path
    )  # the directory that holds only the model
    ids, mask = (t := Template(tokenizer, input_template="User: {}\nAssistant: ")).encode(
        [t.conversation(("who?", "that is"))]
    )[0]
    assert tokenizer.decode(ids[mask == 1]) == "that is</s>" and ids[-1] == tokenizer.eos_token_id


def test_transformers_guess_at_a_sentencepiece_model_is_refused(
    sentencepiece_files: dict[str, str], tmp_path: Path
) -> None:
    """Loaded by transformers as a generic tokenizer, such a model loses its own normalisation without a word."""
    path = shutil.copy(sentencepiece_files["bpe"], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    guessed = AutoTokenizer.from_pretrained(tmp_path)
    exact = load_tokenizer(path)
    assert guessed("that  is")["input_ids"] != exact("that  is", add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="does not read this sentencepiece model exactly") as caught:
        load_tokenizer(str(tmp_path))
    assert path in str(caught.value.fix)


def test_a_slow_tokenizer_is_converted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converters = importlib.import_module(
        "transformers.convert_slow_tokenizer"
    )  # transformers' own attribute is module or function
    byt5 = tmp_path / "byt5"
    byt5.mkdir()
    (byt5 / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    (byt5 / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match="ByT5Tokenizer is a slow tokenizer and transformers cannot convert it"):
        load_tokenizer(str(byt5))

    # one that transformers can convert: bytes again, by a converter of our own, first right and then wrong
    from tokenizers import Tokenizer, decoders, models, normalizers

    def converted(slow: Any, wrong: bool = False) -> Tokenizer:
        vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
        backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Lowercase() if wrong else None
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return backend

    monkeypatch.setattr(converters, "convert_slow_tokenizer", converted)
    tokenizer = load_tokenizer(str(byt5))
    assert tokenizer.is_fast and tokenizer("naïve", add_special_tokens=False)["input_ids"] == [
        b + 3 for b in "naïve".encode()
    ]
    template = Template(tokenizer, input_template="{}=")
    ids, mask = template.encode([template.conversation(("é", "🙂"))])[0]
    assert mask.tolist() == [0] * 3 + [1] * 5 and tokenizer.decode(ids[mask == 1]) == "🙂</s>"
    monkeypatch.setattr(converters, "convert_slow_tokenizer", lambda slow: converted(slow, wrong=True))
    with pytest.raises(DataError, match="conversion of ByT5Tokenizer to a fast tokenizer is not exact"):
        load_tokenizer(str(byt5))


def test_files_that_are_no_tokenizer(tmp_path: Path, sentencepiece_files: dict[str, str]) -> None:
    ranks = tmp_path / "cl100k_base.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256)))
    damaged = tmp_path / "o200k_base.tiktoken"
    damaged.write_bytes(ranks.read_bytes() + b"IQ= 256\n")
    llama = tmp_path / "tokenizer.model"
    llama.write_bytes(ranks.read_bytes())
    broken = tmp_path / "broken.model"
    broken.write_bytes(Path(sentencepiece_files["bpe"]).read_bytes()[:1000])
    text = tmp_path / "notes.txt"
    text.write_text("hello\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = {
        ranks: "256 ranks",
        damaged: "o200k_base.tiktoken:257: not a line of a tiktoken file",
        llama: "a tiktoken file holds token ranks only",
        broken: "not a sentencepiece model",
        text: "not a tokenizer",
        empty: "no tokenizer files",
        tmp_path / "absent": "no such file or directory",
    }
    for path, message in expected.items():
        with pytest.raises(DataError, match=message):
            load_tokenizer(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json"])
def test_a_pipe_or_device_is_not_read(name: str, make: Callable[[Path], None], world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "qwen2", tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    make(tmp_path / "model" / name)
    with pytest.raises(DataError, match=f"{name}: neither a file"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("text", ["null", "5", "[" * 9999, '{"added_tokens": [], "a": 1}', '{"added_tokens": 5}'])
def test_a_tokenizer_json_of_anything_is_refused(text: str, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "qwen2", tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("name", ENCODINGS)
def test_tiktoken_files_give_gigatokens_ids(name: str, tmp_path: Path) -> None:
    """An independent reader of the same files: gigatoken's. The ranks are made up:
    every byte, then pairs and triples of likely bytes.
    """
    import gigatoken

    letters = [bytes([b]) for b in range(256)]
    common = [bytes([b]) for b in b" etaoinshrdlu\n.,'1TES/\xc3\xa9\xf0\x9f"]
    pairs = [a + b for a in common for b in common]
    tokens = dict.fromkeys(
        [*letters, *pairs, *(p + c for p in pairs for c in common), *(a + b for a in letters for b in letters)]
    )
    tokens |= dict.fromkeys(
        a + b + c for a in letters for b in letters for c in (common[:3] if name != "r50k_base" else [])
    )
    tokens = list(tokens)[: ENCODINGS[name].ranks]
    assert len(tokens) == ENCODINGS[name].ranks
    path = tmp_path / f"{name}.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens)))
    tokenizer = load_tokenizer(str(path))
    other = gigatoken.Tokenizer.from_tiktoken(path)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in ENCODINGS[name].special} == other._tiktoken_specials
    for text in [*PROBES, "it's the stone, that IS'LL 1234 tests\n\n/path/ é", "x <|endoftext|> y"]:
        assert tokenizer(text)["input_ids"] == other.encode(text).tolist(), text
    assert tokenizer.eos_token == "<|endoftext|>" and vocab_size(tokenizer) == max(ENCODINGS[name].special.values()) + 1


def test_probes_are_hard(tokenizers: dict[str, Any]) -> None:
    """What the verification stands on: no probe twice, and every class of character that goes wrong among them."""
    assert len(set(PROBES)) == len(PROBES)
    everything = "".join(PROBES)
    for needed in (
        "\r\n",
        "\x00",
        "\u0301",
        "\u200d",
        "\ufeff",
        "\u2003",
        "🇩🇪",
        "👍🏽",
        "½",
        "ß",
        "\u3000",
        " " * 50,
        "<0x0A>",
        "▁",
    ):
        assert needed in everything


def test_a_tokenizer_that_transformers_rebuilds_without_its_words_is_refused(tmp_path: Path) -> None:
    """It makes a Qwen2 tokenizer of any tokenizer.json beside a config.json of that type: a BPE without merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"yes": 0, "no": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("yes no")["input_ids"] == [0, 1]
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(DataError, match="makes a Qwen2Tokenizer of tokenizer.json that gives no ids"):
        load_tokenizer(tmp_path)
