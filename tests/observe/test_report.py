"""report.html: one file, nothing loaded from elsewhere, nothing of the user's text taken for markup."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mrlhf.errors import DataError
from mrlhf.observe.report import build_report, line_chart

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "ppo run"
    (folder / "samples").mkdir(parents=True)
    rows = [
        {"step": s, "critic/score/mean": s / 10, "objective/kl": None if s == 3 else 0.01 * s, "actor/lr": 1e-5}
        for s in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 20, "eval/loss": 0.5}\n{"step": 21, "cri'
    )
    (folder / "config.yaml").write_text("model:\n  path: models/<toy>\nreward:\n  sources: ['model:rm', 'f.py:g']\n")
    (folder / "env.json").write_text('{"stage": "ppo", "versions": {"torch": "2.13"}}')
    for step, text in ((1, "<script>alert(1)</script>"), (9, "nine"), (20, "twenty & more")):
        row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": text, "score": 0.123456789}
        (folder / "samples" / f"step_{step}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_report(run, tmp_path):
    extra = {
        "title": "PPO <toy>",
        "summary": {"gold reward before": 0.25, "after": 0.75},
        "curves": {"ppo": {"gold reward": [[0, 0.25], [20, 0.75]]}},
    }
    path = build_report({"ppo": run}, tmp_path / "out" / "report.html", extra=extra)
    page = path.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!#)", page) and "http" not in page
    assert "PPO &lt;toy&gt;" in page and "models/&lt;toy&gt;" in page and "model:rm, f.py:g" in page
    assert "Samples at step 1<" in page and "Samples at step 20<" in page and "nine" not in page
    assert "[user] Hi" in page and "twenty &amp; more" in page and "0.1235" in page
    assert "gold reward before" in page and page.index("gold reward</figcaption>".replace("</figcaption>", "")) > 0
    assert "2.13" in page and "20 steps" in page
    assert page.count("<figure>") == 5
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_sources_of_a_blend(run, tmp_path):
    (run / "config.yaml").write_text("data:\n  train:\n  - prefix: data/a\n    weight: 0.7\n  - data/b\n")
    page = build_report({"ppo": run}, tmp_path / "r.html").read_text()
    assert '<th>data.train</th><td class="n">{prefix: data/a, weight: 0.7}, data/b</td>' in page
    (run / "config.yaml").write_text("data: [")
    with pytest.raises(DataError, match=r"config\.yaml: not valid YAML"):
        build_report({"ppo": run}, tmp_path / "r.html")


def test_charts_are_well_formed_svg_with_a_gap_at_nan(run, tmp_path):
    page = build_report({"ppo": run}, tmp_path / "r.html").read_text()
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    kl = next(c for c in charts if c.get("aria-label") == "KL to the reference")
    assert [len(line.get("points").split()) for line in kl.findall("polyline")] == [2, 17]


def test_line_chart_stays_inside_its_frame():
    svg = line_chart("x", {"a": [(1, 5.0), (2, -3.0), (3, 1e-9)], "b": [(1, 0.0)]})
    frame = ET.fromstring(re.search(r"<svg.*</svg>", svg).group())
    points = [tuple(map(float, p.split(","))) for line in frame.findall("polyline") for p in line.get("points").split()]
    assert len(points) == 3 and all(0 <= x <= 360 and 0 <= y <= 190 for x, y in points)
    assert points[0][1] < points[2][1] < points[1][1]
    assert len(frame.findall("circle")) == 1


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [1e-30, 2e-30], [-1e30, 1e30], [0.1, 0.1 + 1e-15], [math.inf, 1.0]]
)
def test_line_chart_of_odd_values(values):
    svg = line_chart("x", {"a": list(enumerate(values))})
    assert "nan" not in svg and "inf" not in svg and "<svg" in svg


def test_scores_of_a_reward_model(run, tmp_path):
    """Three bins; the highest bar reaches the height of its tick, an empty bin has none."""
    (run / "rewards.json").write_text(
        json.dumps({"edges": [-1.0, 0.0, 1.0, 2.0], "chosen": [0, 10, 30], "rejected": [30, 10, 0]})
    )
    page = build_report({"rm": run}, tmp_path / "r.html").read_text()
    chart = next(
        c
        for c in map(ET.fromstring, re.findall(r"<svg.*?</svg>", page))
        if c.get("aria-label", "").startswith("scores")
    )
    bars = [{k: float(bar.get(k)) for k in ("x", "y", "width", "height")} for bar in chart.findall("rect")]
    assert len(bars) == 4 and all(bar["y"] + bar["height"] == pytest.approx(168) for bar in bars)
    assert bars[1]["height"] == pytest.approx(3 * bars[0]["height"], abs=0.2) and bars[0]["x"] + bars[0][
        "width"
    ] == pytest.approx(bars[1]["x"], abs=0.2)
    assert bars[2]["x"] == 52 and bars[1]["x"] + bars[1]["width"] == pytest.approx(350, abs=0.2)


def test_nothing_to_draw():
    assert line_chart("x", {"a": [(1, math.nan)]}) == "" and line_chart("x", {}) == ""


def test_a_long_run_makes_a_small_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "train/loss": {1 / i}}}\n' for i in range(1, 20001))
    )
    assert len(build_report({"long": tmp_path}, tmp_path / "r.html").read_text()) < 40_000


def test_several_runs_and_a_missing_one(run, tmp_path):
    page = build_report({"before": run, "after run": run}, tmp_path / "r.html").read_text()
    assert page.count("<section") == 2 and 'href="#run-after-run"' in page and 'id="run-after-run"' in page
    with pytest.raises(DataError, match="run 'sft' has no metrics.jsonl"):
        build_report({"sft": tmp_path / "none"}, tmp_path / "r.html")


def test_a_damaged_line_is_named(run, tmp_path):
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2: not a JSON object"):
        build_report({"ppo": run}, tmp_path / "r.html")
