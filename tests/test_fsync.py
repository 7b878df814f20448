"""Power may fail at any moment: what a rename makes visible has been on the disk before, and the rename itself soon after."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import python


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(world: Path, tmp_path: Path, background: str) -> None:
    run = tmp_path / "run"
    values = {
        "model.path": world / "qwen2", "data.train": world / "sft", "train.output_dir": run, "train.global_batch_size": 4,
        "train.max_steps": 2, "checkpoint.save_interval": 1, "checkpoint.async_save": background,
    }  # fmt: skip
    done = python("tests/fsync_program.py", "sft", *(part for k, v in values.items() for part in (f"--{k}", v)))
    events = [tuple(e) for e in json.loads(next(s for s in done.stdout.splitlines() if s.startswith("RESULT "))[7:])]
    for step in (1, 2):
        final, temporary = run / f"checkpoints/step_{step}", run / f"checkpoints/step_{step}.tmp"
        at = events.index(("rename", str(temporary), str(final)))
        before = {path for kind, path, *_ in events[:at] if kind == "fsync"}
        for folder, _, files in os.walk(final):
            place = temporary / Path(folder).relative_to(final)
            wanted = {str(place), *(str(place / name) for name in files)}
            # a file written under a temporary name of its own is synced under that name
            assert all(any(p == w or p.startswith(w + ".") for p in before) for w in wanted), sorted(wanted - before)
        latest = next(i for i in range(at, len(events)) if events[i][0] == "rename" and events[i][2].endswith("/latest"))
        assert ("fsync", str(run / "checkpoints")) in events[at:latest], "the rename, before anything points to it"
        assert ("fsync", events[latest][1]) in events[at:latest], "the pointer's text, before it has its name"
