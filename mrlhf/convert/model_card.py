"""README.md of an exported model: the model, its training data, the command, and the last metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.foreign import read_json
from mrlhf.config.load import saved_values
from mrlhf.config.options import DataSource
from mrlhf.config.schema import show_value
from mrlhf.observe.redaction import redact
from mrlhf.observe.report import read_jsonl

_STAGES = {
    "pretrain": "pre-trained on text",
    "sft": "fine-tuned on conversations",
    "rm": "trained as a reward model",
    "dpo": "trained on preferences (DPO)",
    "ppo": "trained by reinforcement learning from human feedback (PPO)",
}


def model_card(source: ModelSource) -> str:
    """Markdown with the metadata that the hub reads, without what the run's directory does not hold."""
    manifest = source.manifest
    stage, step = manifest["stage"], manifest["step"]
    task = "text-classification" if source.head == "value" else "text-generation"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", f"tags: [mrlhf, {stage}]", "---", ""]
    lines += [f"# {source.spec.family}, {_STAGES.get(stage, stage)}", ""]
    kind = "a value model with one label" if source.head == "value" else "a language model"
    size = f"{source.spec.num_parameters:,} parameters, {kind}, {manifest['dtype']}"
    lines += [f"{size}. Trained with mrlhf {manifest['mrlhf']}.", "", f"- stage: {stage}, step {step}"]
    lines += [f"- {key}: {manifest[key]:.6g}" for key in ("reward_mean", "reward_std") if key in manifest]
    run = _run_directory(source.path)
    if run is not None:
        lines += _run_lines(run, step)
    return "\n".join(lines) + "\n"


def _run_directory(checkpoint: Path) -> Path | None:
    """runs/x for runs/x/checkpoints/step_10 or its part runs/x/checkpoints/step_10/critic."""
    for parent in checkpoint.resolve().parents:
        if parent.name == "checkpoints":
            return parent.parent
    return None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, nan=True) if path.is_file() else {}


def _run_lines(run: Path, step: int) -> list[str]:
    file, env, lines = run / "config.yaml", _read_json(run / "env.json"), []
    config = saved_values(file)
    if "model.path" in config:
        lines.append(f"- started from: {config['model.path']}")
    for key, label in (("data.train", "train"), ("data.eval", "eval"), ("ptx.data", "ptx")):
        lines += _sources_lines(label, config.get(key))
    if env:
        versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items())
        lines += [f"- command: `{' '.join(map(str, env.get('argv', ())))}`", f"- versions: {versions}"]
    lines += _metric_lines(run / "metrics.jsonl", step)
    if config:
        text = "\n".join(redact(file.read_text(encoding="utf-8").rstrip().splitlines()))
        lines += ["", "## Configuration", "", "```yaml", text, "```"]
    return lines


def _sources_lines(label: str, value: Any) -> list[str]:
    """value: as the configuration has it: the sources of a blend, a prefix, or None."""
    lines = []
    for source in value if isinstance(value, tuple) else () if value is None else (DataSource(value),):
        terms = "".join(f", {k} {show_value(v)}" for k, v in vars(source).items() if k != "prefix" and v is not None)
        lines += [f"- {label} data: {source.prefix}{terms}", *_data_lines(Path(source.prefix))]
    return lines


def _data_lines(prefix: Path) -> list[str]:
    meta = _read_json(prefix.with_name(prefix.name + ".json"))
    counts = {"num_samples": "samples", "num_tokens": "tokens"}
    lines = [f"  - {meta[key]:,} {what}" for key, what in counts.items() if key in meta]
    files = meta.get("files", {})
    return lines + [f"  - {suffix}: sha256 {entry['sha256']}" for suffix, entry in files.items() if "sha256" in entry]


def _metric_lines(path: Path, step: int) -> list[str]:
    """The last training line up to `step`, and the last evaluation."""
    if not path.is_file():
        return []
    rows = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
    train = [row for row in rows if any(not key.startswith("eval/") for key in row if key != "step")]
    evaluation = [row for row in rows if any(key.startswith("eval/") for key in row)]
    pairs = [pair for row in (*train[-1:], *evaluation[-1:]) for pair in row.items()]
    last = {key: value for key, value in pairs if isinstance(value, float)}
    kept = [key for key in sorted(last) if not key.startswith(("time", "perf", "memory"))]
    if not kept:
        return []
    return ["", "## Metrics", "", "| metric | value |", "|---|---|", *(f"| {key} | {last[key]:.6g} |" for key in kept)]
