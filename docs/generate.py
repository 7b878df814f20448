"""Writes what the docs take from the code: docs/metrics.md, and the option tables at the end of docs/configuration.md
and docs/data.md.

    python docs/generate.py

A test holds both files to what this prints.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mrlhf.config.options import STAGES  # noqa: E402
from mrlhf.config.schema import Option, options_of  # noqa: E402
from mrlhf.data.prepare.options import PreprocessConfig  # noqa: E402
from mrlhf.observe.metrics import markdown_table  # noqa: E402

MARK = "<!-- from here on written by docs/generate.py -->\n"
METRICS = (
    "# Metrics\n\nEvery number that a run logs, to the console, `metrics.jsonl` and the trackers. "
    "Written by docs/generate.py from\n"
    "`mrlhf/observe/metrics.py`; a key that is not in this table is logged with a warning.\n\n"
)


def _default(option: Option) -> str:
    if option.required:
        return "required"
    value = option.default
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "none" if value == () else str(value)


def _rows(found: dict[str, Option]) -> list[str]:
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for key, option in found.items():
        cells = (f"`{key}`", option.type_name, _default(option), option.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def option_tables() -> str:
    """A table for each section, under the stages that have it,
    then the options of score and generate that have no section.
    """
    sections: dict[str, dict[str, Option]] = {}
    stages: dict[str, list[str]] = {}
    for stage, cls in STAGES.items():
        for key, option in options_of(cls).items():
            section = key.rpartition(".")[0] or stage
            sections.setdefault(section, {})[key] = option
            if stage not in stages.setdefault(section, []):
                stages[section].append(stage)
    lines: list[str] = []
    for section, found in sections.items():
        title = (
            f"the command `{section}`"
            if stages[section] == [section] and "." not in next(iter(found))
            else f"`{section}`"
        )
        lines += [f"### {title}", "", f"Stages: {', '.join(stages[section])}.", "", *_rows(found), ""]
    return "\n".join(lines)


def preprocess_table() -> str:
    """The options of tools/preprocess_data.py."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in fields(PreprocessConfig):
        default = (
            "required" if field.default is MISSING else "" if field.default is None else str(field.default).lower()
        )
        flag = "--" + field.name.replace("_", "-")
        name = f"`{flag}`, `--no-{flag[2:]}`" if isinstance(field.default, bool) else f"`{flag}`"
        lines.append(
            f"| {name} | {default} | " + field.metadata["help"].replace("|", "\\|").replace("\n", "\\n") + " |"
        )
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every file this script writes, with its content."""
    found = {HERE / "metrics.md": METRICS + markdown_table()}
    for path, table in ((HERE / "configuration.md", option_tables()), (HERE / "data.md", preprocess_table())):
        kept, mark, _ = path.read_text(encoding="utf-8").partition(MARK)
        assert mark, f"{path} has lost the line {MARK!r}"
        found[path] = f"{kept}{MARK}\n{table}"
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
