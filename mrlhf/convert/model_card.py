"""README.md of an exported model: what it is, what it was trained on, by which command, and how it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mrlhf.checkpoint.source import ModelSource

_STAGES = {
    "pretrain": "pre-trained on text",
    "sft": "fine-tuned on conversations",
    "rm": "trained as a reward model",
    "dpo": "trained on preferences (DPO)",
    "ppo": "trained by reinforcement learning from human feedback (PPO)",
}


def model_card(source: ModelSource) -> str:
    """Markdown with the metadata that the hub reads. What the run's directory does not hold is left out."""
    manifest = source.manifest
    stage, step = manifest["stage"], manifest["step"]
    task = "text-classification" if source.head == "value" else "text-generation"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [mrlhf, " + stage + "]", "---", ""]
    lines += [f"# {source.spec.family}, {_STAGES.get(stage, stage)}", ""]
    kind = "a value model with one label" if source.head == "value" else "a language model"
    lines += [f"{source.spec.num_parameters:,} parameters, {kind}, {manifest['dtype']}. Trained with mrlhf {manifest['mrlhf']}.", ""]
    lines += [f"- stage: {stage}, step {step}"]
    lines += [f"- {key}: {manifest[key]:.6g}" for key in ("reward_mean", "reward_std") if key in manifest]
    run = _run_directory(source.path)
    if run is not None:
        lines += _run(run, step)
    return "\n".join(lines) + "\n"


def _run_directory(checkpoint: Path) -> Path | None:
    """runs/x of runs/x/checkpoints/step_10 or of its part runs/x/checkpoints/step_10/critic."""
    for parent in checkpoint.resolve().parents:
        if parent.name == "checkpoints":
            return parent.parent
    return None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _run(run: Path, step: int) -> list[str]:
    config = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").is_file() else {}
    env = _json(run / "env.json")
    lines = []
    if config:
        lines.append(f"- started from: {config['model']['path']}")
        for split in ("train", "eval"):
            prefix = config["data"].get(split)
            if prefix:
                lines += [f"- {split} data: {prefix}", *_data(Path(prefix))]
    if env:
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        lines += [f"- command: `{' '.join(map(str, env['argv']))}`", f"- versions: {versions}"]
    lines += _metrics(run / "metrics.jsonl", step)
    if config:
        lines += ["", "## Configuration", "", "```yaml", yaml.safe_dump(config, sort_keys=False).rstrip(), "```"]
    return lines


def _data(prefix: Path) -> list[str]:
    meta = _json(prefix.with_name(prefix.name + ".json"))
    found = [f"  - {meta[key]:,} {what}" for key, what in (("num_samples", "samples"), ("num_tokens", "tokens")) if key in meta]
    found += [f"  - {suffix}: sha256 {digest['sha256']}" for suffix, digest in meta.get("files", {}).items() if "sha256" in digest]
    return found


def _metrics(path: Path, step: int) -> list[str]:
    """The last training line up to `step`, and the last evaluation."""
    if not path.is_file():
        return []
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["step"] <= step]
    train = [row for row in rows if any(not k.startswith("eval/") for k in row if k != "step")]
    evaluation = [row for row in rows if any(k.startswith("eval/") for k in row)]
    values = {
        k: v
        for row in (*train[-1:], *evaluation[-1:])
        for k, v in row.items()
        if isinstance(v, float) and not k.startswith(("time", "perf", "memory"))
    }
    if not values:
        return []
    return ["", "## Metrics", "", "| metric | value |", "|---|---|", *(f"| {k} | {v:.6g} |" for k, v in sorted(values.items()))]
