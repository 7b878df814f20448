"""Tokenizers trained on the spot, and a writer for input files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .chat_templates import CHATML, SPECIAL

CORPUS = [
    "The quick brown fox jumps over the lazy dog. User: what is that? Assistant: that is a fox.",
    "Assistant: that that that this thing there then them they. User: hello, who are you?",
    "I am a small model. I like numbers: 1, 2, 3, 40, 500 and 6000. system user assistant",
    "def f(x):\n    return x + 1\n\nprint(f(2))\n# déjà vu, naïve café, 東京 and 🙂",
    "Once upon a time there was a robot who read books. The end of the story is here.",
    "yes no maybe perhaps surely never always often Question: Answer: Instruction: Response:",
] * 20


def _save(tokenizer: Tokenizer, directory: Path, **special: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE in the manner of GPT-2, ChatML as its template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _save(
        tokenizer, tmp_path_factory.mktemp("bpe"), eos_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:]
    )


@pytest.fixture(scope="session")
def merging_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE without a pre-tokenizer's borders, so that "Assistant: " + "that" merges across the boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" that", " this", ": that"] * 50 + CORPUS, trainer)
    return _save(
        tokenizer, tmp_path_factory.mktemp("merging"), eos_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:]
    )


@pytest.fixture(scope="session")
def unigram_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Unigram with Metaspace and byte fallback in the manner of sentencepiece;
    puts <s> before every text like Llama does.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    pieces = ["<unk>", "<s>", "</s>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=700, special_tokens=pieces, unk_token="<unk>", show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _save(
        tokenizer,
        tmp_path_factory.mktemp("unigram"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
    )


@pytest.fixture(scope="session")
def wordpiece_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """WordPiece in the manner of BERT, lower case.
    Its vocabulary holds the special tokens as words too, as BERT's does.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[UNK]", "[CLS]", "[SEP]", *SPECIAL]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    return _save(
        tokenizer,
        tmp_path_factory.mktemp("wordpiece"),
        eos_token="[SEP]",
        unk_token="[UNK]",
        additional_special_tokens=["[CLS]", *SPECIAL],
    )


@pytest.fixture(scope="session")
def sentencepiece_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models trained by sentencepiece itself: kind ("unigram", "bpe", with "_bytes" for byte fallback) -> path of the
    .model.
    """
    import io

    import sentencepiece

    paths = {}
    for kind in ("unigram", "bpe"):
        for fallback in (False, True):
            model = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS),
                model_writer=model,
                model_type=kind,
                vocab_size=460 if fallback else 240,
                byte_fallback=fallback,
                hard_vocab_limit=False,
                minloglevel=2,
            )
            path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
            path.write_bytes(model.getvalue())
            paths[kind + ("_bytes" if fallback else "")] = str(path)
    return paths


@pytest.fixture(scope="session")
def tokenizers(
    load: Callable[[str], Any],
    bpe_dir: str,
    merging_dir: str,
    unigram_dir: str,
    wordpiece_dir: str,
    sentencepiece_files: dict[str, str],
) -> dict[str, Any]:
    """One of each kind, with the special tokens of every template."""
    found = {
        "bpe": load(bpe_dir),
        "merging": load(merging_dir),
        "unigram": load(unigram_dir),
        "wordpiece": load(wordpiece_dir),
    }
    for kind in ("unigram", "bpe"):
        found[f"sentencepiece {kind}"] = load(sentencepiece_files[f"{kind}_bytes"])
        found[f"sentencepiece {kind}"].add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


@pytest.fixture(scope="session")
def load() -> Callable[[str], Any]:
    from mrlhf.data.prepare.template import load_tokenizer

    kept: dict[str, Any] = {}

    def get(directory: str) -> Any:
        if directory not in kept:
            kept[directory] = load_tokenizer(directory)
        return kept[directory]

    return get


@pytest.fixture(params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, load: Callable[[str], Any]) -> Any:
    return load(request.getfixturevalue(f"{request.param}_dir"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (objects, or raw strings) to a file and return its path."""

    def write(rows: list[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
            encoding="utf-8",
        )
        return str(path)

    return write
