"""The chat templates that come with mrlhf: `--chat-template NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrlhf.data.tokenizers.special import special_tokens
from mrlhf.errors import DataError

# The special tokens that each template writes; "eos": that of the tokenizer.
TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("eos",),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "zephyr": ("eos",),
    "alpaca": ("eos",),
    "plain": ("eos",),
}

TEMPLATE_NAMES = tuple(TOKENS)


def ready_made(name: str, tokenizer: Any) -> str:
    """The Jinja source of template `name`. Raises DataError where the tokenizer lacks special tokens that it writes."""
    known = set(special_tokens(tokenizer))
    wanted = [tokenizer.eos_token or "an eos token" if t == "eos" else t for t in TOKENS[name]]
    if name == "llama3" and tokenizer.bos_token is not None:
        wanted.remove("<|begin_of_text|>")
    missing = [t for t in wanted if t not in known]
    if "an eos token" in missing:
        raise DataError(f"the tokenizer has no eos token, which --chat-template {name} writes",
                        where=tokenizer.name_or_path, fix="set eos_token in the tokenizer's configuration")
    if missing:
        raise DataError(
            f"the tokenizer has no special tokens {missing}, which --chat-template {name} writes: "
            "they would be encoded as ordinary text",
            where=tokenizer.name_or_path,
            expected=f"a tokenizer with {wanted} among its special tokens",
            fix="--chat-template plain, or add them with "
            "tokenizer.add_special_tokens({'additional_special_tokens': [...]}) and resize the model's embeddings",
        )
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
