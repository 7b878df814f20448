"""Log-probs from hidden states: the chunked head against whole logits;
memory and time, forward and backward, in fp32 on CPU.

usage: python benchmarks/logprobs.py [--tokens 8192] [--vocab 151936] [--hidden 64] [--entropy-tokens 2048]
                                      [--repeats 3] [--output FILE]

Each measurement is a process of its own, so that its peak resident size says what it took; the two ways take turns.
With the entropy the whole way holds five times [T, V], which at 8192 tokens no ordinary machine has: hence fewer tokens
there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("whole", "chunked")


def measure(way: str, tokens: int, vocab: int, hidden_size: int, *, with_entropy: bool) -> dict[str, float]:
    """Peak extra memory in MiB and seconds of forward and backward, after a warm-up on few tokens;
    and sums of the results to compare.
    """
    import torch

    from mrlhf.models.layers.logprobs import Head, head_logprobs

    def run(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if way == "chunked":
            logps, entropy, *_ = head_logprobs(hidden, targets, Head(weight, vocab), with_entropy=with_entropy)
        else:
            whole = torch.log_softmax((hidden @ weight.T).float(), -1)
            logps = whole.gather(-1, targets[:, None])[:, 0]
            entropy = -(whole.exp() * whole).sum(-1) if with_entropy else torch.zeros_like(logps)
        (logps.sum() + 0.1 * entropy.sum()).backward()
        assert hidden.grad is not None and weight.grad is not None
        return logps.detach(), hidden.grad, weight.grad

    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, hidden_size, generator=generator) / hidden_size**0.5).requires_grad_()
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    run(hidden[:8].detach().requires_grad_(), weight, targets[:8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    logps, of_hidden, of_weight = run(hidden, weight, targets)
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "seconds": seconds,
        "cpu_seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
        "extra_mib": extra,
        "logps": float(logps.double().sum()),
        "grad_hidden": float(of_hidden.double().norm()),
        "grad_weight": float(of_weight.double().norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--entropy-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(
            json.dumps(
                measure(args.measure[0], args.tokens, args.vocab, args.hidden, with_entropy=args.measure[1] == "1")
            )
        )
        return
    sizes = ("--vocab", str(args.vocab), "--hidden", str(args.hidden))
    lines = [
        "# Log-probs through the LM head",
        "",
        f"`python benchmarks/logprobs.py --tokens {args.tokens} --vocab {args.vocab} --hidden {args.hidden} "
        f"--entropy-tokens {args.entropy_tokens} --repeats {args.repeats}`; "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), fp32, CPU; forward and backward, "
        "each run a process of its own, in turns; medians.",
        "",
        "| result | way | extra memory, MiB | wall s | CPU s (with start-up) |",
        "|---|---|---|---|---|",
    ]
    for entropy, tokens in ((False, args.tokens), (True, args.entropy_tokens)):
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way in WAYS:
                command = [
                    sys.executable,
                    __file__,
                    *sizes,
                    "--tokens",
                    str(tokens),
                    "--measure",
                    way,
                    str(int(entropy)),
                ]
                runs[way].append(
                    json.loads(
                        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                    )
                )
        median = {way: {k: statistics.median(r[k] for r in found) for k in found[0]} for way, found in runs.items()}
        for way in WAYS:
            m = median[way]
            what = f"{'log-prob and entropy' if entropy else 'log-prob'}, {tokens} tokens"
            lines.append(f"| {what} | {way} | {m['extra_mib']:,.0f} | {m['seconds']:.1f} | {m['cpu_seconds']:.1f} |")
        whole, chunked = median["whole"], median["chunked"]
        worst = max(abs(chunked[k] / whole[k] - 1) for k in ("logps", "grad_hidden", "grad_weight"))
        lines.append(
            f"| | chunked / whole | {chunked['extra_mib'] / whole['extra_mib']:.4f} | "
            f"{chunked['seconds'] / whole['seconds']:.2f} | "
            f"{chunked['cpu_seconds'] / whole['cpu_seconds']:.2f} (results differ by {worst:.0e} relative) |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
