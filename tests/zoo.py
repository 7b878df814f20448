"""One tiny random HF model of every kind that a weight map must get right, and what transformers computes with it."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import FAMILIES, make_hf_model

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
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3_moe_mixed": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "gemma3_linear_rope": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    **{family: (family, {}) for family in FAMILIES if family not in ("llama", "qwen2", "qwen3")},
}  # fmt: skip
MOE = [kind for kind, (family, _) in KINDS.items() if family in ("mixtral", "qwen3_moe")]
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
        layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
        make_hf_model(root / name, family, vocab_size=VOCAB, seed=seed, **{**layers, **changes})  # type: ignore[arg-type]
        # eager: sdpa leaves out Gemma 2's soft cap
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            torch.save([model(ids[None]).logits[0] for ids in samples()], root / f"{name}.pt")
    return root


STEPS, LR = 5, 1e-3


def train_reference(root: Path, kind: str) -> list[dict[str, float]]:
    """Loss and gradient norm of a few steps of torch's AdamW on all samples, the mean over their tokens, clipped at 0.5."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(root / kind, dtype=torch.float32, attn_implementation="eager").eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") for ids in samples()]
        tokens = sum(len(ids) - 1 for ids in samples())
        loss = torch.stack(losses).nansum() / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
    return found
