"""A save holds what the rank itself writes: no rank gathers another's optimizer state."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import TESTS, python


def test_a_rank_of_eight_saves_its_eighth_of_8b_parameters(tmp_path: Path) -> None:
    """TP 1, DP 8, bfloat16. With Megatron's fully_reshardable each rank gathered 12 bytes a parameter: 96 GB, 0.8 TB on
    the machine. Now it is an eighth of 14, weights included, in the background; in front one tensor at a time.
    """
    done = python(TESTS / "cuda/save_memory_program.py", tmp_path, 0, 5, device="rehearsal")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    for rank in found.values():
        share = 14 * rank["parameters"] / 8
        for phase in ("foreground", "background"):
            plan = rank[phase]
            assert abs(plan["written"] / share - 1) < 0.02, "ranks write equal parts"
            assert plan["device"] == plan["sent"] == 0
            assert plan["copied"] == plan["on the host"] <= (1.02 * share if phase == "background" else 0)
            assert plan["largest"] <= 128_256 * 4096 * 2, "the embedding is the largest tensor that waits to be written"
