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
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    # every expert chosen: where one of them hangs in the balance, training may differ by more than rounding
    "deepseek_v2_plain": ("deepseek_v2", {"q_lora_rank": 40, "topk_method": "greedy", "n_routed_experts": 4,
                                          "num_experts_per_tok": 4,
                                          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "deepseek_v3_dense": ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False,
                                          "first_k_dense_replace": 2, "tied": True}),
    **{family: (family, {}) for family in FAMILIES if family not in ("llama", "qwen2", "qwen3")},
}  # fmt: skip
MOE = [
    kind
    for kind, (family, changes) in KINDS.items()
    if family in ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3") and changes.get("first_k_dense_replace") != 2
]
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
        model = AutoModelForCausalLM.from_pretrained(
            root / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            torch.save([model(ids[None]).logits[0] for ids in samples()], root / f"{name}.pt")
    return root


STEPS, LR = 5, 1e-3


BALANCE = (1.0, 0.002)  # weights of the routers' two losses


def _balance_of(gate: torch.nn.Module, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """[2]: one sample's load-balancing loss (Switch Transformer, eq. 4) and z-loss of one layer, times its tokens."""
    logits = torch.nn.functional.linear(hidden_TH.float(), gate.weight.float())
    scores = logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.softmax(-1)
    f = torch.nn.functional.one_hot(chosen_TK, logits.size(1)).float().sum(1).mean(0) / chosen_TK.size(1)
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return len(hidden_TH) * torch.stack([logits.size(1) * (f * p).sum(), logits.logsumexp(-1).square().mean()])


def train_reference(root: Path, kind: str, *, balanced: bool = False) -> list[dict[str, float]]:
    """Loss and gradient norm of a few steps of torch's AdamW on all samples, the mean over their tokens,
    clipped at 0.5.

    balanced: with the auxiliary losses of routers, weighted by BALANCE; `loss` is without them.
    """
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        root / kind, dtype=torch.float32, attn_implementation="eager"
    ).eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found, aux = [], []
    if balanced:
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.register_forward_hook(
                    lambda gate, args, out: aux.append(_balance_of(gate, args[0].flatten(0, -2), out[2]))
                )
    for _ in range(STEPS):
        optimizer.zero_grad()
        aux.clear()
        losses = [
            torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            for ids in samples()
        ]
        tokens = sum(len(ids) - 1 for ids in samples())
        loss = torch.stack(losses).nansum() / tokens
        total = loss
        if balanced:  # the mean over tokens, the sum over layers
            layers, of_all = len(aux) // len(samples()), torch.stack(aux).sum(0) / sum(map(len, samples()))
            total = loss + of_all[0] * BALANCE[0] + of_all[1] * BALANCE[1]
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
        if balanced:
            found[-1] |= {
                "moe_aux_loss": float(of_all[0].detach()) / layers,
                "moe_z_loss": float(of_all[1].detach()) / layers,
            }
    return found
