"""One self-contained HTML file on one or several runs: curves, last values, first and last samples, environment.

The curves are inline SVG: writing needs no plotting package, reading no network.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from mrlhf import __version__
from mrlhf.errors import DataError

Points = list[tuple[float, float]]

# The charts in their order; the keys of one tuple share a chart. The table of last values has every logged key.
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("train/loss", "eval/loss")),
    ("score", ("critic/score/mean", "critic/rewards/mean")),
    ("KL to the reference", ("objective/kl",)),
    ("response length", ("response_length/mean", "response_length/max")),
    ("accuracy", ("train/accuracy", "eval/accuracy", "train/rewards/accuracies", "eval/rewards/accuracies")),
    ("token accuracy", ("train/mean_token_accuracy", "eval/mean_token_accuracy")),
    ("perplexity", ("eval/perplexity",)),
    ("accuracy by margin of the scores", tuple(f"eval/accuracy_by_margin/{m}" for m in "0-0.5 0.5-1 1-2 2+".split())),
    ("margin", ("train/margin", "eval/margin", "train/rewards/margins", "eval/rewards/margins")),
    ("rewards", ("train/rewards/chosen", "train/rewards/rejected")),
    ("entropy", ("train/entropy", "actor/entropy")),
    ("policy loss", ("actor/pg_loss",)),
    ("value loss", ("critic/vf_loss",)),
    ("explained variance", ("critic/vf_explained_var",)),
    ("trainer - vLLM log-prob", ("rollout/logprob_abs_diff_mean",)),
    ("gradient norm", ("train/grad_norm", "actor/grad_norm", "critic/grad_norm")),
    ("learning rate", ("train/lr", "actor/lr", "critic/lr")),
    ("tokens / s / rank", ("perf/tokens_per_s_per_gpu",)),
)
_SUMMARY = (
    "model.path model.init model.dtype data.train train.global_batch_size train.micro_batch_size train.num_epochs "
    "train.max_steps optim.lr parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size "
    "rollout.tensor_parallel_size rollout.batch_size rollout.n ppo.estimator kl.coef dpo.beta reward.sources"
).split()
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2")
_MAX_SAMPLES = 8
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 190, 52, 10, 8, 22

_CSS = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --card: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 0; } h3 { font-size: 15px; margin: 22px 0 8px; }
.soft { color: var(--soft); } a { color: #2563eb; text-decoration: none; }
nav a { margin-right: 16px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 22px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px 10px; }
figcaption { font-size: 13px; font-weight: 600; } svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n { font-variant-numeric: tabular-nums; text-align: right; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 18px;
  min-width: 150px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
@media (max-width: 760px) { .two { grid-template-columns: 1fr; } }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 0 0 9px; font-size: 13px;
  overflow-wrap: anywhere; }
.sample dt { color: var(--soft); font-size: 12px; } .sample dd { margin: 0 0 6px; white-space: pre-wrap; }
details { margin-top: 14px; } summary { cursor: pointer; color: #2563eb; }
pre { background: #f6f7f9; border-radius: 8px; padding: 12px; overflow: auto; font-size: 12px; }
"""


def build_report(
    run_dirs: Mapping[str, str | Path], output: str | Path, *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Writes a report on the named runs, in the given order. Returns its path.

    extra: may hold "title", "text", "summary" (label -> value, shown as tiles) and "curves" (run name ->
    {label: [[step, value], ...]}), e.g. the gold reward that only the caller knows. Raises DataError naming a directory
    that is no run's, or a damaged line.
    """
    extra = extra or {}
    for name, folder in run_dirs.items():
        if not (Path(folder) / "metrics.jsonl").is_file():
            expected = "a run directory (train.output_dir)"
            raise DataError(f"run '{name}' has no metrics.jsonl", where=str(folder), expected=expected)
    curves = extra.get("curves") or {}
    sections = [_run_section(name, Path(folder), curves.get(name) or {}) for name, folder in run_dirs.items()]
    title = str(extra.get("title") or "mrlhf: " + ", ".join(run_dirs))
    tiles = "".join(f'<div class="tile"><span class="soft">{_e(k)}</span><b>{_e(_number(v))}</b></div>'
                    for k, v in (extra.get("summary") or {}).items())
    nav = "".join(f'<a href="#{_anchor(name)}">{_e(name)}</a>' for name in run_dirs)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{_CSS}</style></head><body><main><h1>{_e(title)}</h1>"
        f'<p class="soft">mrlhf {__version__}, {time.strftime("%Y-%m-%d %H:%M")}</p><nav>{nav}</nav>'
        + (f"<p>{_e(extra['text'])}</p>" if extra.get("text") else "")
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + "".join(sections)
        + "</main></body></html>\n"
    )
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, target)
    return target


@dataclass(frozen=True)
class _Axes:
    """Maps data coordinates to the SVG coordinates of one figure, and draws the figure."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y0) / ((self.y1 - self.y0) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    def figure(self, title: str, ticks: list[float], marks: list[str], labels: Iterable[str], x_format: str) -> str:
        """The marks in their frame, with one coloured entry in the caption for each label."""
        frame = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_e(title)}"'
        parts = [f'<svg {frame} font-size="10" font-family="inherit">']
        for tick in ticks:
            line, y = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}"', self.y(tick)
            parts.append(f'<line {line} y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
            text = f'x="{_LEFT - 6}" y="{y + 3:.1f}" text-anchor="end" fill="#6b7280"'
            parts.append(f"<text {text}>{_number(tick)}</text>")
        for x, anchor in [(self.x0, "start"), (self.x1, "end")][: 1 + (self.x1 > self.x0)]:
            text = f'x="{self.x(x):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}" fill="#6b7280"'
            parts.append(f"<text {text}>{x:{x_format}}</text>")
        legend = "&ensp;".join(f'<span style="color:{colour}">&#9632;</span> {_e(label)}'
                               for colour, label in zip(cycle(_COLOURS), labels))
        caption = f'{_e(title)} <span class="soft" style="font-weight:400">{legend}</span>'
        return f"<figure><figcaption>{caption}</figcaption>{''.join(parts + marks)}</svg></figure>"


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """One figure; every series is a list of (step, value). Values that are not finite leave a gap."""
    finite = [(x, y) for points in series.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    ticks = _ticks(min(ys), max(ys))
    axes = _Axes(min(xs), max(xs), min(ticks[0], *ys), max(ticks[-1], *ys))
    marks = []
    for colour, points in zip(cycle(_COLOURS), series.values()):
        for run in _without_gaps(_thin(points)):
            if len(run) == 1:
                (x, y), *_ = run
                marks.append(f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3" fill="{colour}"/>')
            else:
                path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in run)
                stroke = f'stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"'
                marks.append(f'<polyline points="{path}" fill="none" {stroke}/>')
    return axes.figure(title, ticks, marks, series, "g")


def histogram_chart(title: str, edges: Sequence[float], series: Mapping[str, Sequence[float]]) -> str:
    """One figure of counts: edges [n + 1], each series [n]; the series are drawn over each other."""
    ticks = _ticks(0.0, max(max(counts) for counts in series.values()))
    axes = _Axes(edges[0], edges[-1], 0.0, ticks[-1])
    marks = []
    for colour, counts in zip(cycle(_COLOURS), series.values()):
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                place = f'x="{axes.x(low):.1f}" y="{axes.y(count):.1f}"'
                size = f'width="{axes.x(high) - axes.x(low):.1f}" height="{axes.y(0) - axes.y(count):.1f}"'
                marks.append(f'<rect {place} {size} fill="{colour}" fill-opacity="0.5"/>')
    return axes.figure(title, ticks, marks, series, ".3g")


def _rewards(file: Path) -> str:
    """The histogram of a reward model's scores in its last evaluation."""
    if not file.is_file():
        return ""
    counts = _json(file)
    series = {k: counts[k] for k in ("chosen", "rejected")}
    return histogram_chart("scores of the last evaluation, answers", counts["edges"], series)


def _run_section(name: str, folder: Path, curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    history: dict[str, Points] = {}
    for row in read_jsonl(folder / "metrics.jsonl"):
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float, type(None))):
                history.setdefault(key, []).append((row.get("step", 0), math.nan if value is None else float(value)))
    config_file, env_file = folder / "config.yaml", folder / "env.json"
    config_text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    env = _json(env_file) if env_file.exists() else {}
    steps = max((int(points[-1][0]) for points in history.values()), default=0)
    charts = [line_chart(label, {label: [(float(x), float(y)) for x, y in points]}) for label, points in curves.items()]
    for title, keys in _CHARTS:
        charts.append(line_chart(title, {k: history[k] for k in keys if k in history}))
    charts.append(_rewards(folder / "rewards.json"))
    chosen = _summary(config_text, str(config_file))
    last_values = _table({k: points[-1][1] for k, points in sorted(history.items())})
    parts = [
        f'<section id="{_anchor(name)}"><h2>{_e(name)}</h2>',
        f'<p class="soft">{_e(env.get("stage", ""))} &middot; {steps} steps &middot; {_e(folder)}</p>',
        _table(chosen) if chosen else "",
        f'<div class="charts" style="margin-top:14px">{"".join(charts)}</div>',
        _samples(folder / "samples"),
        f"<details><summary>Last values of all metrics</summary>{last_values}</details>",
        f"<details><summary>Configuration</summary><pre>{_e(config_text)}</pre></details>" if config_text else "",
        f"<details><summary>Environment</summary><pre>{_e(json.dumps(env, indent=2))}</pre></details>" if env else "",
        "</section>",
    ]
    return "".join(parts)


def _samples(folder: Path) -> str:
    """The first and the last file of samples side by side."""
    files = folder.glob("step_*.jsonl")
    numbered = {int(m.group(1)): p for p in files if (m := re.fullmatch(r"step_(\d+)\.jsonl", p.name))}
    if not numbered:
        return ""
    columns = []
    for step in sorted({min(numbered), max(numbered)}):
        cards = "".join(_sample(row) for row in read_jsonl(numbered[step])[:_MAX_SAMPLES])
        columns.append(f"<div><h3>Samples at step {step}</h3>{cards}</div>")
    return f'<div class="two">{"".join(columns)}</div>'


def _sample(row: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
            return "\n".join(f"[{m.get('role', '')}] {m['content']}" for m in value)
        return _number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)

    return f'<dl class="sample">{"".join(f"<dt>{_e(k)}</dt><dd>{_e(show(v))}</dd>" for k, v in row.items())}</dl>'


def _summary(config_text: str, where: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise DataError("not valid YAML", where=where) from error
    values = {}
    for key in _SUMMARY:
        section, _, leaf = key.partition(".")
        of_section = config.get(section) if isinstance(config, dict) else None
        value = of_section.get(leaf) if isinstance(of_section, dict) else None
        if value is not None:
            values[key] = ", ".join(map(_item, value)) if isinstance(value, list) else value
    return values


def _item(value: Any) -> str:
    """An item of a list; a source of a blend as the user writes it."""
    if not isinstance(value, dict):
        return str(value)
    return "{" + ", ".join(f"{name}: {part}" for name, part in value.items()) + "}"


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f'<tr><th>{_e(k)}</th><td class="n">{_e(_number(v))}</td></tr>' for k, v in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=str(file), fix="remove it, or copy it again")
    return value


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, without an incomplete last line (the run may still write). Raises DataError."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            if number < len(lines):
                raise DataError("not a JSON object", where=f"{file}:{number}") from None
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return [low]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def _thin(points: Points, most: int = 600) -> Points:
    """At most `most` points, each the mean of its neighbours: a long run must not make a file of many MiB."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _without_gaps(points: Points) -> list[Points]:
    runs: list[Points] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _anchor(name: str) -> str:
    return "run-" + re.sub(r"[^a-zA-Z0-9]+", "-", name)


def _e(text: Any) -> str:
    return html.escape(str(text))
