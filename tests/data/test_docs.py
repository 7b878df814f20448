"""The worked examples of docs/data.md, run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_worked_examples(tmp_path: Path, bpe_dir: str) -> None:
    section = (ROOT / "docs/data.md").read_text().split("## Worked examples", 1)[1].split("\n## ", 1)[0]
    script = "\n".join(
        line.removeprefix("    ") for line in section.splitlines() if line.startswith("    ") or not line
    )
    assert len(re.findall("preprocess_data.py", script)) >= 6
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TOKENIZER": bpe_dir}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metas = {f.stem: json.loads(f.read_text()) for f in tmp_path.glob("*.json")}
    kept = {name: meta["num_kept"] for name, meta in metas.items()}
    assert kept["alpaca_train"] + kept["alpaca_valid"] == 200 and 20 < kept["alpaca_valid"] < 60
    assert {n: k for n, k in kept.items() if "alpaca" not in n} == {
        "sft": 3,
        "piped": 200,
        "pairs": 2,
        "prompts": 1,
        "text": 120,
    }
    assert metas["text"]["drops"] == {"bad row (missing:text)": 1, "over_weight": 60}
    assert '"problem":' in done.stdout and "[[6<|im_end|>]]" in done.stdout
