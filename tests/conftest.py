"""Small real things for the tests: random HF models of each family with a trained tokenizer, data, torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from launch import launch

from mrlhf.observe import log

log.set_up()  # as the command line does
FEW = 18
ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """The CPU, whatever GPU there is, unless `-m gpu` or `-m gpu8` asks for GPUs. One word where there are none."""
    wanted = {"gpu": 1, "gpu8": 8}.get(config.option.markexpr, 0)
    os.environ.setdefault("MRLHF_DEVICE", "cuda" if wanted else "cpu")
    if wanted:
        import torch

        from mrlhf.errors import EnvironmentProblem

        try:
            from mrlhf.parallel import device

            device.current()  # says what is wrong with a driver or a build
        except EnvironmentProblem as problem:
            raise pytest.UsageError(f"-m {config.option.markexpr} needs {wanted} GPU(s). {problem.what}") from None
        count = torch.cuda.device_count()
        if count < wanted:
            raise pytest.UsageError(f"-m {config.option.markexpr} needs {wanted} GPUs, and torch sees {count}")


def environment() -> dict[str, str]:
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",  # the stacks of a rank that aborts
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), *inherited]),  # which may have packages
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "TORCH_COMPILE_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def run(*command: object, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A command from the repository root; its output goes into the failure's message."""
    done = subprocess.run(
        [str(c) for c in command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(f"{done.args} exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def python(
    *command: object, ranks: int = 1, vllm: bool = False, check: bool = True, timeout: float = 300, device: str = ""
) -> subprocess.CompletedProcess[str]:
    """`run(sys.executable, ...)`, or for more ranks `torchrun(ranks, ...)`, with the imports done (launch.py); `vllm`:
    its imports too.

    device: "rehearsal" for a program that rehearses CUDA (mrlhf/parallel/rehearsal.py).
    """
    env = environment() | ({"MRLHF_DEVICE": device} if device else {})
    return _checked(launch(ranks, command, env=env, vllm=vllm, timeout=timeout), check)


def torchrun(ranks: int, *args: object, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node ranks ARGS` on a free port."""
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        ranks,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    )
    return run(*launcher, *args, check=check, timeout=timeout)


def mrlhf(*args: object, ranks: int = 1, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command line, plain or under torchrun's agent, with the imports done."""
    return python("-m", "mrlhf", *args, ranks=ranks, vllm=args[0] in ("ppo", "generate"), check=check, timeout=timeout)


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a new module. By its path, not its name:
    folders of tests are called convert and rl, too.
    """
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def make_tokenizer(directory: Path, texts: list[str], vocab_size: int = 320) -> None:
    """A byte-level BPE with ChatML tokens, saved as a HF tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


_LATENT = {
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 24,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
# family -> transformers' name, and what its smallest interesting model has beyond SIZES
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                               "norm_topk_prob": True}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": True, "sliding_window": 9, "query_pre_attn_scalar": 50,
                          "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": ("Gemma3", {"tie_word_embeddings": True, "sliding_window": 9, "query_pre_attn_scalar": 50,
                               "_sliding_window_pattern": 2}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.1,
                            "logits_scaling": 0.5}),
    "glm4": ("Glm4", {}),
    "starcoder2": ("Starcoder2", {"tie_word_embeddings": True, "sliding_window": 9}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True, "no_rope_layer_interval": 2}),
    "seed_oss": ("SeedOss", {"attention_out_bias": True}),
    # the second layer alone has experts
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "num_key_value_heads": 4, "n_routed_experts": 8,
                                   "num_experts_per_tok": 3, "n_shared_experts": 2,
                                   "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                                   "routed_scaling_factor": 1.7,
                                   "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, "q_lora_rank": 40, "num_key_value_heads": 4, "n_routed_experts": 8,
                                   "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
                                   "topk_method": "noaux_tc", "scoring_func": "sigmoid",
                                   "num_nextn_predict_layers": 0,
                                   "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8}}),
}  # fmt: skip
_OTHER_NAMES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "intermediate_size": "n_inner",
        "num_key_value_heads": "",
        "head_dim": "",
    },
    "starcoder2": {"rms_norm_eps": "norm_epsilon", "head_dim": ""},
    **{family: {"head_dim": ""} for family in ("phi3", "olmo2", "granite", "smollm3", "deepseek_v2", "deepseek_v3")},
}


def make_hf_config(family: str, *, vocab_size: int, tied: bool = False, **changes: object) -> Any:
    """Of the family's smallest interesting model."""
    import transformers as t

    name, more = FAMILIES[family]
    values: dict[str, object] = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    for old, new in _OTHER_NAMES.get(family, {}).items():
        value = values.pop(old)
        if new:
            values[new] = value
    return getattr(t, name + ("TextConfig" if family == "gemma3_text" else "Config"))(**{**values, **more, **changes})


def make_hf_model(
    directory: Path, family: str, *, vocab_size: int, seed: int = 0, tied: bool = False, **changes: object
) -> None:
    """Random weights with every parameter away from its neutral value, so that a wrong mapping shows."""
    import torch
    import transformers as t

    config = make_hf_config(family, vocab_size=vocab_size, tied=tied, **changes)
    torch.manual_seed(seed)
    model = getattr(t, FAMILIES[family][0] + ("LMHeadModel" if family == "gpt2" else "ForCausalLM"))(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                p.add_(torch.randn_like(p) * 0.1)
            if name.endswith("bias"):
                p.normal_(0, 0.1)
            if name.endswith(
                "gate.weight"
            ):  # of a router: far from ties, which two correct programs may break differently
                p.normal_(0, 0.5)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(0, 0.3)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)


def conversations(n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Chats of varied length, some with a system turn or two user turns."""
    import random

    rng = random.Random(seed)
    words = "red green blue one two three four apple pear plum sun moon rain snow".split()

    def text(k: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, k)))

    found = []
    for i in range(n):
        chat = [{"role": "system", "content": "Answer."}] if i % 3 == 0 else []
        for _ in range(1 + i % 2):
            chat += [{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(6)}]
        found.append(chat)
    return found


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_world(root: Path) -> Path:
    """A directory with HF models qwen2/, llama/, qwen3/, qwen3_moe/ (one tokenizer)
    and data prefixes sft, pref, prompts, text.

    sft_few and so on hold the first FEW rows (of pairs half as many),
    for programs that train on all of them many times.
    """
    from mrlhf.data.prepare.job import preprocess
    from mrlhf.data.prepare.options import PreprocessConfig

    chats = conversations(48)
    texts = [m["content"] for chat in chats for m in chat] + ["system user assistant"]
    for family in ("qwen2", "llama", "qwen3", "qwen3_moe"):
        make_tokenizer(root / family, texts)
        make_hf_model(root / family, family, vocab_size=323)
    pairs = [
        {"prompt": c[:-1], "chosen": [c[-1]], "rejected": [d[-1]]}
        for c, d in zip(chats, conversations(48, seed=1), strict=True)
    ]
    prompts = [{"prompt": c[:-1], "label": len(c)} for c in chats]
    sources = {
        ("sft", "sft"): [{"messages": c} for c in chats],
        ("pref", "preference"): pairs,
        ("prompts", "prompts"): prompts,
        ("text", "pretrain"): [{"text": t} for t in texts],
    }
    for (name, task), rows in sources.items():
        for prefix, part in ((name, rows), (f"{name}_few", rows[: FEW // 2 if name == "pref" else FEW])):
            file = write_jsonl(root / f"{prefix}.jsonl", part)
            options = {"input": (str(file),), "tokenizer": str(root / "qwen2"), "output_prefix": str(root / prefix)}
            preprocess(PreprocessConfig(task=task, **options, seq_length=160, workers=1))
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_world`. Read only."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of every kind of every family, with transformers' logits (zoo.py). Read only."""
    from zoo import make_zoo

    return make_zoo(tmp_path_factory.mktemp("zoo"))
