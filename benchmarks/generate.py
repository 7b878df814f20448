"""vLLM inside mrlhf against bare `LLM.generate` on the same prompts, in the same process and run;
and where a PPO step's time goes.

    python benchmarks/generate.py [--prompts 64] [--new-tokens 64] [--repeats 9]
                                  [--metrics runs/quickstart/ppo/metrics.jsonl]
                                  [--output benchmarks/results/generate.md]

One engine, three ways in turns, the order turning too: `LLM.generate` as a user would call it (no seeds, no log-probs);
with the seeds and log-probs that PPO needs; and a whole rollout of mrlhf, from prompts to the gathered answers. The
first round does not count. The table of a step is made from the metrics of a run that is already there (make
quickstart).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# phases whose time is generation, a forward pass or an update; what is left of a step is overhead
WORK = ("gen", "reward", "logprobs", "values", "update_actor", "update_critic")


def throughput(args: argparse.Namespace) -> list[str]:
    """Rows of the table."""
    os.environ.update(MRLHF_DEVICE="cpu", TORCH_COMPILE_DISABLE="1", TORCH_CPP_LOG_LEVEL="ERROR")
    import tempfile

    import mrlhf.parallel  # noqa: F401  (adapts megatron.core)
    from mrlhf.config.options import ParallelConfig
    from mrlhf.models.families import spec_from_hf
    from mrlhf.parallel import state
    from mrlhf.rl.rollout.tables import generate_rollout, request_seed
    from mrlhf.rl.rollout.vllm_engine import Sampling, VLLMEngine

    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": args.hidden,
        "intermediate_size": 2 * args.hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64,
        "vocab_size": 1024,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    state.initialize(ParallelConfig(), seed=1)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        engine = VLLMEngine(
            spec_from_hf(config),
            Path(directory),
            dtype="float32",
            tp=1,
            max_model_len=32 + args.new_tokens,
            kv_cache_mib=256,
            max_num_seqs=args.prompts,
            seed=1,
        )
    from vllm import SamplingParams

    prompts = [[(7 * i + 3 * j) % 1000 + 5 for j in range(12 + i % 16)] for i in range(args.prompts)]
    sampling = Sampling(1.0, 1.0, -1, args.new_tokens, ())
    texts = [{"prompt_token_ids": p} for p in prompts]
    seeds = [request_seed(1, 1, i, 0) for i in range(len(prompts))]
    plain = {"temperature": 1.0, "max_tokens": args.new_tokens, "detokenize": False}

    def bare(**more: object) -> int:
        params = [
            SamplingParams(**plain, **{k: v[i] if isinstance(v, list) else v for k, v in more.items()})
            for i in range(len(prompts))
        ]
        return sum(len(o.outputs[0].token_ids) for o in engine.llm.generate(texts, params, use_tqdm=False))

    def ours() -> int:
        rollout = generate_rollout(
            engine, prompts, n=1, sampling=sampling, seed=1, step=1, labels=[None] * len(prompts), replicas=1, replica=0
        )
        return sum(len(a.tokens) for a in rollout.answers)

    arms: dict[str, Callable[[], int]] = {
        "LLM.generate": bare,
        "LLM.generate with seeds and log-probs": lambda: bare(seed=seeds, logprobs=0),
        "mrlhf rollout": ours,
    }
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(args.repeats + 1):
        names = list(arms)
        for name in names[i % 3 :] + names[: i % 3]:
            assert engine.llm.reset_prefix_cache()
            start, used = time.perf_counter(), time.process_time()
            tokens = arms[name]()
            assert tokens == args.prompts * args.new_tokens, "random weights stopped early"
            if i:
                wall[name].append(tokens / (time.perf_counter() - start))
                cpu[name].append(tokens / (time.process_time() - used))
    engine.shutdown()
    state.shutdown()
    rows = [f"| {name} | {median(wall[name]):,.0f} | {median(cpu[name]):,.0f} |" for name in arms]
    for name in list(arms)[:2]:
        pairs = [
            sorted(a / b for a, b in zip(table["mrlhf rollout"], table[name], strict=True)) for table in (wall, cpu)
        ]
        rows.append(
            "| mrlhf / "
            + name
            + " | "
            + " | ".join(f"{median(p):.3f} ({p[0]:.3f} to {p[-1]:.3f})" for p in pairs)
            + " |"
        )
    return rows


def step_table(file: Path) -> list[str]:
    """Mean seconds of every phase over the steps that train both models, and the share of what is no work."""
    steps = [row for row in map(json.loads, file.read_text().splitlines()) if "timing_s/update_actor" in row]
    names = [k.removeprefix("timing_s/") for k in steps[0] if k.startswith("timing_s/") and k != "timing_s/step"]
    total = sum(s["timing_s/step"] for s in steps)
    share = {name: sum(s[f"timing_s/{name}"] for s in steps) / total for name in names}
    rest = 1 - sum(share.values())
    lines = ["| phase | s a step | share |", "|---|---|---|"]
    lines += [f"| {name} | {share[name] * total / len(steps):.3f} | {share[name]:.1%} |" for name in names]
    lines.append(f"| what no phase has | {rest * total / len(steps):.3f} | {rest:.1%} |")
    overhead = 1 - sum(share.get(name, 0.0) for name in WORK)
    return [
        *lines,
        "",
        (
            f"{len(steps)} steps. Everything that is not generation, a forward pass or an update: "
            f"{overhead:.2%} of a step."
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of a PPO run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        "# Generation inside mrlhf",
        "",
        f"`python benchmarks/generate.py --prompts {args.prompts} --new-tokens {args.new_tokens} "
        f"--hidden {args.hidden} --repeats {args.repeats}`; "
        "Qwen2 of 4 layers, fp32, one process on one thread; medians, and ratios of the same round.",
        "",
        "| | tokens / s | tokens / CPU s |",
        "|---|---|---|",
        *throughput(args),
        "",
        (
            "The second way is what PPO asks of vLLM, token for token the same work: "
            "what mrlhf adds to it is the last line. The line before has vLLM's own"
        ),
        (
            "price of a seed for every request (answers that do not depend on the number of ranks) and of the "
            "sampled tokens' log-probs."
        ),
    ]
    if args.metrics:
        lines += [
            "",
            "## A step of the quickstart's PPO",
            "",
            f"From `{args.metrics.name}` of `make quickstart`'s PPO stage (2 ranks, TP 2).",
            "",
        ]
        lines += step_table(args.metrics)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
