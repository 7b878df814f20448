"""Code lines of the package by folder, and of the files in the reading order of docs/architecture.md.

A code line bears a token that is neither a comment nor part of a docstring. Standard library only.
usage: python scripts/count_lines.py
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> int:
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def reading_order() -> list[Path]:
    """The files of the numbered lists under "Reading order" in docs/architecture.md, each once."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("## Reading order")[2].partition("\n## ")[0]
    names = re.findall(r"^\d+\. `(mrlhf/[\w/]+\.py)`", section, re.MULTILINE)
    return [ROOT / name for name in dict.fromkeys(names)]


def main() -> None:
    folders: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path in sorted(ROOT.glob("mrlhf/**/*.py")):
        folder = str(path.parent.relative_to(ROOT))
        folders[folder] += code_lines(path)
        files[folder] += 1
    for folder, lines in folders.items():
        print(f"{folder:<28} {files[folder]:>4} files {lines:>7,} code lines")
    print(f"{'package':<28} {sum(files.values()):>4} files {sum(folders.values()):>7,} code lines")
    order = reading_order()
    print(f"{'reading order':<28} {len(order):>4} files {sum(map(code_lines, order)):>7,} code lines")


if __name__ == "__main__":
    main()
