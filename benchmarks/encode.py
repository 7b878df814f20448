"""What masks, templates and arrays cost beside the tokenizer itself, on one core:
text -> (ids, mask) against bare `encode_batch_fast`.

    python benchmarks/encode.py [--megabytes 4] [--rounds 7] [--output benchmarks/results/encode.md]

The tokenizer (byte-level BPE, Llama-3's way of cutting words, 16k ids) and the texts (Zipf words, numbers, punctuation)
are made here from a seed. Each round runs every variant once, in turn; figures are medians over the rounds and their
ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mrlhf.data.prepare.ready_made import ready_made
from mrlhf.data.prepare.template import Template
from mrlhf.data.tokenizers.encoder import choose_encoder

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_texts(rng: np.random.Generator, number: int, words: int) -> list[str]:
    """`number` texts of about `words` words each: 40,000 different words by Zipf's law, with numbers,
    accents and line ends.
    """
    syllables = np.asarray("ba be ci do fu ga hi jo ka le mi no pu ra sé ti vo wa xy zu er in on an th st".split())
    lexicon = np.asarray(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(40_000)])
    ends = np.asarray([" ", " ", " ", " ", " ", " ", ", ", ". ", ".\n\n", " 1984 ", " (", "'s "])
    weights = 1 / np.arange(1, len(lexicon) + 1)
    texts = []
    for _ in range(number):
        length = max(2, int(rng.lognormal(np.log(words), 0.6)))
        chosen = rng.choice(lexicon, length, p=weights / weights.sum())
        texts.append("".join(w + e for w, e in zip(chosen, rng.choice(ends, length), strict=True)))
    return texts


def make_tokenizer(texts: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )


def measure(variants: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of CPU (one thread; other programs do not count) and tokens of each;
    the first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    tokens = {}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.process_time()
            tokens[name] = run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}, tokens


def in_chunks(items: list[Any], encode: Callable[[list[Any]], list[Any]], size: int = 256) -> int:
    """Tokens of all items, encoded `size` at a time as the pipeline does."""
    return sum(
        len(r[0]) if isinstance(r, tuple) else len(r)
        for i in range(0, len(items), size)
        for r in encode(items[i : i + size])
    )


def table(title: str, megabytes: float, documents: int, seconds: dict[str, float], tokens: dict[str, int]) -> list[str]:
    bare = next(iter(seconds))
    hf = next(name for name in seconds if name.endswith("hf"))
    lines = [f"## {title}", "", f"{documents:,} texts, {megabytes:.2f} MB (bare), {tokens[bare] / 1e6:.2f} Mtok", ""]
    lines += ["| variant | MB/s | docs/s | Mtok/s | of bare | of mrlhf with hf |", "|---|---|---|---|---|---|"]
    for name, s in seconds.items():
        rates = f"{megabytes / s:.2f} | {documents / s:,.0f} | {tokens[name] / s / 1e6:.2f}"
        lines.append(f"| {name} | {rates} | {seconds[bare] / s:.2f} | {seconds[hf] / s:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "encode.md")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    texts = make_texts(rng, max(1, int(args.megabytes * 1e6 / 1600)), 200)
    tokenizer = make_tokenizer(texts[: len(texts) // 2])
    # turns of 60 words, four a conversation
    turns = make_texts(rng, max(4, int(args.megabytes * 1e6 / 480)) // 4 * 4, 60)
    roles = ("user", "assistant") * 2
    chats = [
        [{"role": r, "content": t} for r, t in zip(roles, turns[i : i + 4], strict=True)]
        for i in range(0, len(turns), 4)
    ]

    chat_hf = Template(tokenizer, chat_template=ready_made("chatml", tokenizer))
    rendered = [chat_hf.conversation(c).text for c in chats]
    encoder, note = choose_encoder(tokenizer, "gigatoken", [*rendered[:1000], *texts[:1000]])
    chat_giga = Template(tokenizer, chat_template=chat_hf.chat_template, encoder=encoder)
    text_hf = Template(tokenizer, input_template="{}")
    text_giga = Template(tokenizer, input_template="{}", encoder=encoder)
    for one, other in ((chat_hf, chat_giga),):
        pairs = zip(*([t.encode([t.conversation(c) for c in chats]) for t in (one, other)]), strict=True)
        assert all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))

    bare = tokenizer.backend_tokenizer

    def call(batch: list[str]) -> list[Any]:
        return tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True)["input_ids"]

    def chat(template: Template) -> Callable[[], int]:
        return lambda: in_chunks(chats, lambda b: template.encode([template.conversation(c) for c in b]))

    fast = "bare encode_batch_fast"
    chat_figures = measure(
        {
            fast: lambda: in_chunks(rendered, lambda b: bare.encode_batch_fast(b, add_special_tokens=False)),
            "transformers' call with offsets": lambda: in_chunks(rendered, call),
            "mrlhf, hf": chat(chat_hf),
            "mrlhf, gigatoken": chat(chat_giga),
        },
        args.rounds,
    )
    text_figures = measure(
        {
            fast: lambda: in_chunks(texts, lambda b: bare.encode_batch_fast(b, add_special_tokens=False)),
            "mrlhf, hf": lambda: in_chunks(texts, text_hf.encode_text),
            "mrlhf, gigatoken": lambda: in_chunks(texts, text_giga.encode_text),
        },
        args.rounds,
    )
    lines = [
        "# Text to ids and masks, one core",
        "",
        f"`python benchmarks/encode.py --megabytes {args.megabytes:g} --rounds {args.rounds}`, ",
    ]
    lines[-1] += (
        f"{platform.machine()}, Python {platform.python_version()}; {note}. Seconds are of CPU; "
        "medians of interleaved rounds."
    )
    lines += [
        "",
        *table(
            "Chats: ChatML rendered, ids and masks",
            sum(len(t.encode()) for t in rendered) / 1e6,
            len(chats),
            *chat_figures,
        ),
    ]
    lines += table("Plain text: ids with eos", sum(len(t.encode()) for t in texts) / 1e6, len(texts), *text_figures)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
