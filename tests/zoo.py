"""One tiny random HF model of every kind that a weight map must get right, and what transformers computes with it."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import make_hf_model

VOCAB = 323
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# head_dim 128 has frequencies on every side of Llama 3's two thresholds
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 128, "max_position_embeddings": 16384}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
}
LENGTHS = (7, 30, 1, 19)


def samples(vocab_size: int = VOCAB) -> list[torch.Tensor]:
    """Random token ids of a few lengths, the same on every call; not id 0, which pads."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocab_size, (n,), generator=generator) for n in LENGTHS]


def make_zoo(root: Path) -> Path:
    """Writes ROOT/KIND (fp32) and ROOT/KIND.pt: transformers' logits [T, V] of every sample, in fp32."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # two threads of a tiny matmul wait for each other on a busy machine
    root.mkdir(parents=True, exist_ok=True)
    for seed, (name, (family, changes)) in enumerate(KINDS.items()):
        make_hf_model(root / name, family, vocab_size=VOCAB, seed=seed, **changes)  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.save([model(ids[None]).logits[0] for ids in samples()], root / f"{name}.pt")
    return root
