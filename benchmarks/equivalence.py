"""Five training steps of every stage under every layout against one process: the table in docs/parallelism.md.

usage: python benchmarks/equivalence.py [--write]      (--write: into docs/parallelism.md; else to the screen)

Toy model and data are those of the tests, the steps are tests/parallel/parity_program.py's, and
tests/parallel/test_parity.py holds the cases marked `tested` to TOLERANCE. A number is the largest relative difference
of loss or gradient norm over the steps, in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, TOLERANCE = 5, 1e-5
Steps = list[dict[str, float]]
STAGES = ("pretrain", "sft", "rm", "dpo")


@dataclass(frozen=True)
class Layout:
    """`tested`: stages that the tests hold; the benchmark runs all."""

    ranks: int
    options: dict[str, object]
    tested: tuple[str, ...] = ()
    model: str = "qwen2"


TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
SP, VPP = {TP: 2, "sequence_parallel": "true"}, {PP: 2, "virtual_pipeline_model_parallel_size": 2}
OVERLAPPED = {"overlap_grad_reduce": "true", "overlap_param_gather": "true"}
UNPACKED = {"packing": 0, "micro": 3}
BUDGET = {"packing": 0, "budget": 340}  # two packs, or the longest pair
LAYOUTS: dict[str, Layout] = {
    "1 process": Layout(1, {}, STAGES),
    "unpacked": Layout(1, UNPACKED, ("sft", "rm", "dpo")),
    "unpacked, padded left": Layout(1, {"packing": 0, "micro": 4, "side": "left"}, ("rm",)),
    "recompute full": Layout(1, {"recompute": "full"}, ("sft",)),
    "recompute selective": Layout(1, {"recompute": "selective"}, ("sft",)),
    "token budget": Layout(1, {"budget": 340}, ("rm",)),
    "token budget, unpacked": Layout(1, BUDGET, ("sft", "dpo")),
    "TP2": Layout(2, {TP: 2}, ("sft",)),
    "TP2, unpacked": Layout(2, {TP: 2, **UNPACKED}, ("sft", "dpo")),
    "TP2 + SP": Layout(2, SP, ("sft", "dpo")),
    "TP2 + SP, unpacked": Layout(2, {**SP, **UNPACKED}, ("rm", "dpo")),
    "TP2 + SP, token budget, unpacked": Layout(2, {**SP, **BUDGET}, ("rm",)),
    "PP2": Layout(2, {PP: 2}, ("sft", "rm")),
    "PP2, uneven 1 + 3 layers": Layout(2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}, ("sft",)),
    "PP2, interleaved 2": Layout(2, VPP, ("sft", "rm", "dpo")),
    "PP2, interleaved 2, recompute full": Layout(2, {**VPP, "recompute": "full"}, ("sft",)),
    "DP2": Layout(2, {}, ("sft", "pretrain")),
    "DP2, loss weights": Layout(2, {"blend": 1}, ("sft",)),
    "DP2, token budget, unpacked": Layout(2, BUDGET, ("sft", "rm", "dpo")),
    "PP2, interleaved 2, token budget, unpacked": Layout(2, {**VPP, **BUDGET}, ("dpo",)),
    "DP2, overlapped": Layout(2, OVERLAPPED, ("sft", "rm")),
    "DP2 x PP2, interleaved 2, overlapped": Layout(4, {**VPP, **OVERLAPPED}, ("sft",)),
    "CP2": Layout(2, {CP: 2}, ("sft", "rm", "dpo")),
    "CP2, unpacked": Layout(2, {CP: 2, **UNPACKED}, ("sft", "rm", "dpo")),
    "CP2, token budget": Layout(2, {CP: 2, "budget": 340}, ("sft",)),
    "TP2 x PP2": Layout(4, {TP: 2, PP: 2}, ("sft",)),
    "TP2 + SP x CP2": Layout(4, {**SP, CP: 2}, ("sft", "dpo")),
    "TP2 x CP2, unpacked": Layout(4, {TP: 2, CP: 2, **UNPACKED}, ("rm",)),
    "PP2, interleaved 2, x CP2": Layout(4, {**VPP, CP: 2}, ("sft",)),
    "MoE, 1 process": Layout(1, {}, ("sft",), "qwen3_moe"),
    "MoE, EP2": Layout(2, {"expert_model_parallel_size": 2}, ("sft",), "qwen3_moe"),
    "MoE, EP2, overlapped": Layout(2, {"expert_model_parallel_size": 2, **OVERLAPPED}, ("sft",), "qwen3_moe"),
    "MoE, CP2 x EP2": Layout(2, {CP: 2, "expert_model_parallel_size": 2}, ("sft",), "qwen3_moe"),
    "NEFTune, 1 process": Layout(1, {"neftune": 5}, ("sft",)),
    "NEFTune, unpacked": Layout(1, {"neftune": 5, **UNPACKED}, ("sft",)),
    "NEFTune, PP2, interleaved 2": Layout(2, {"neftune": 5, **VPP}, ("sft",)),
    "NEFTune, TP2 + SP x CP2, unpacked": Layout(4, {"neftune": 5, **SP, CP: 2, **UNPACKED}, ("sft",)),
}


def base(name: str) -> str:
    """The layout that another one must equal."""
    kind = name.split(", ")[0]
    return f"{kind}, 1 process" if kind in ("MoE", "NEFTune") else "1 process"


def cases(*, tested: bool) -> list[tuple[str, str]]:
    """(layout, stage)."""

    def wanted(layout: Layout, stage: str) -> bool:
        everywhere = (
            layout.model == "qwen2"
            and layout.options.get("side") != "left"
            and not {"neftune", "blend"} & set(layout.options)
        )
        return stage in layout.tested or (everywhere and not tested)

    return [(name, stage) for name, layout in LAYOUTS.items() for stage in STAGES if wanted(layout, stage)]


def run(world: Path, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], Steps]:
    """All cases, one start of processes for each number of ranks. `world`:
    the directory of tests/conftest.py's `make_world`.
    """
    from conftest import python

    program, found = ROOT / "tests/parallel/parity_program.py", {}
    for ranks in sorted({LAYOUTS[name].ranks for name, _ in wanted}):
        mine = [(name, stage) for name, stage in wanted if LAYOUTS[name].ranks == ranks]
        arguments = []
        for i, (name, stage) in enumerate(mine):
            # Adam moves parameters whose true gradient is 0 by +-lr on rounding noise;
            # a small lr keeps that below the tolerance
            options = {"stage": stage, "model": LAYOUTS[name].model, "lr": 1e-4, **LAYOUTS[name].options}
            arguments.append(f"{i}:" + ",".join(f"{k}={v}" for k, v in options.items()))
        done = python(program, world, STEPS, *arguments, ranks=ranks, timeout=1200)
        results = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
        found |= {case: results[str(i)] for i, case in enumerate(mine)}
    return found


def difference(ours: Steps, theirs: Steps) -> float:
    return max(abs(a[k] / b[k] - 1) for a, b in zip(ours, theirs, strict=True) for k in ("loss", "grad_norm"))


def table(results: dict[tuple[str, str], Steps]) -> str:
    lines = ["| layout | " + " | ".join(STAGES) + " |", "|---" * (1 + len(STAGES)) + "|"]
    for name in LAYOUTS:
        cells = []
        for stage in STAGES:
            ours, theirs = results.get((name, stage)), results.get((base(name), stage))
            if ours is None or theirs is None:
                cells.append("")
            elif name == base(name):
                cells.append(f"loss {ours[0]['loss']:.4f} to {ours[-1]['loss']:.4f}")
            else:
                cells.append(f"{difference(ours, theirs):.0e}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_world

    with tempfile.TemporaryDirectory() as directory:
        text = table(run(make_world(Path(directory)), cases(tested=False)))
    print(text)
    if args.write:
        page = ROOT / "docs/parallelism.md"
        head, _, rest = page.read_text().partition("<!-- equivalence -->\n")
        _, _, tail = rest.partition("<!-- end -->\n")
        page.write_text(f"{head}<!-- equivalence -->\n{text}<!-- end -->\n{tail}")


if __name__ == "__main__":
    main()
