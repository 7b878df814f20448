"""Trains the quickstart's tokenizer and writes a directory that `model.path` takes with `model.init: random`.

    python examples/quickstart/tokenizer.py --data-dir runs/quickstart/data --output-dir runs/quickstart/base

Byte-level BPE with ChatML turns. Capital letters and digits are never merged,
so that the tasks are about single tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}


def texts(data_dir: Path) -> Iterator[str]:
    """Every text of the training files that are there."""
    for path in (data_dir / "pretrain.jsonl", data_dir / "sft_train.jsonl"):
        if not path.is_file():
            continue
        with path.open() as lines:
            for line in lines:
                row = json.loads(line)
                if "text" in row:
                    yield row["text"]
                else:
                    yield from (f"{m['role']}\n{m['content']}" for m in row["messages"])


def train_tokenizer(data_dir: Path, vocab_size: int) -> Qwen2Tokenizer:
    """Merges are learnt from the small letters only: capitals and digits stay single tokens."""
    # Qwen2's own pre-tokenizer, because transformers puts it in place of any other when config.json says qwen2.
    blank = Qwen2Tokenizer()
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    special = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator((re.sub("[A-Z]+", "", text) for text in texts(data_dir)), trainer)
    model = json.loads(trainee.to_str())["model"]
    # Every id of the model must decode to something, and the corpus may hold fewer merges than there is room for.
    reserved = [f"<|reserved_{i}|>" for i in range(vocab_size - len(model["vocab"]))]
    return Qwen2Tokenizer(
        vocab={**model["vocab"], **{token: len(model["vocab"]) + i for i, token in enumerate(reserved)}},
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START, *reserved],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def write_model_directory(data_dir: Path, output_dir: Path, vocab_size: int) -> Qwen2Tokenizer:
    """Tokenizer, config.json and generation_config.json; no weights."""
    if vocab_size % 64:
        raise SystemExit(f"--vocab-size {vocab_size} must be a multiple of 64")
    tokenizer = train_tokenizer(data_dir, vocab_size)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output_dir)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = {**CONFIG, "vocab_size": vocab_size, "bos_token_id": None, **ids}
    (output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    (output_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="where corpus.py has written")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=512)
    args = parser.parse_args()
    tokenizer = write_model_directory(args.data_dir, args.output_dir, args.vocab_size)
    print(f"{args.output_dir}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
