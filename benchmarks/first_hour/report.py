"""What a part of the first hour leaves behind: checks first, then figures, on disk after every line of them."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    from mrlhf.observe.tracker import collect_env

    return collect_env()["versions"]


@dataclass
class Report:
    """Of one part. Every method writes the files again, so that a part that is cut off keeps what it has."""

    name: str
    title: str
    folder: Path
    rehearsal: bool
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    skipped: str = ""
    ended: bool = False
    started: float = field(default_factory=time.time)

    @property
    def status(self) -> str:
        if self.skipped:
            return "SKIP"
        if not all(ok for _, ok, _ in self.checks):
            return "FAIL"
        return "PASS" if self.ended else "CUT"

    def check(self, what: str, ok: bool, detail: object = "") -> None:
        self.checks.append((what, bool(ok), str(detail)))
        print(f"{'PASS' if ok else 'FAIL'}  {what}  {detail}", flush=True)
        self.write()

    def figure(self, **values: Any) -> None:
        self.figures.append(values)
        print("      " + "  ".join(f"{name} {_short(value)}" for name, value in values.items()), flush=True)
        self.write()

    def say(self, text: str) -> None:
        self.words.append(text)
        print(f"      {text}", flush=True)
        self.write()

    def skip(self, why: str) -> None:
        self.skipped = why
        print(f"SKIP  {self.name}: {why}", flush=True)
        self.write()

    def end(self) -> None:
        self.ended = True
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "part": self.name,
            "status": self.status,
            "rehearsal": self.rehearsal,
            "seconds": round(time.time() - self.started, 1),
            "checks": [{"what": what, "ok": ok, "detail": detail} for what, ok, detail in self.checks],
            "figures": self.figures,
            "words": self.words + ([f"skipped: {self.skipped}"] if self.skipped else []),
            "python": platform.python_version(),
        }
        for suffix, text in ((".json", json.dumps(content, indent=1)), (".md", self.markdown(content))):
            partial = self.folder / f".{self.name}{suffix}"
            partial.write_text(text + "\n")
            partial.replace(self.folder / f"{self.name}{suffix}")

    def markdown(self, content: dict[str, Any]) -> str:
        lines = [f"# {self.title}: {content['status']}", "", f"{content['seconds']:.0f} s."]
        if self.rehearsal:
            lines[-1] += (
                " A rehearsal on fake CUDA tensors: no number here was measured on a GPU, and times do not exist."
            )
        if self.checks:
            lines += ["", "| | check | |", "|---|---|---|"]
            lines += [f"| {'PASS' if ok else 'FAIL'} | {what} | {detail} |" for what, ok, detail in self.checks]
        for columns in dict.fromkeys(tuple(row) for row in self.figures):
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            rows = [row for row in self.figures if tuple(row) == columns]
            lines += ["| " + " | ".join(_short(row[c]) for c in columns) + " |" for row in rows]
        return "\n".join([*lines, *(f"\n{word}" for word in content["words"])])


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
