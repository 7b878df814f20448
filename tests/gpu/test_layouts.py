"""Layouts of many ranks over NCCL train as one process of transformers does; small, over gloo, in `make test`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TESTS, make_hf_model
from zoo import KINDS, VOCAB, train_reference

from gpu.places import in_places, program

DENSE = ("llama", "gemma2", "glm4")
EXPERTS = ("mixtral", "deepseek_v3")
# of eight ranks: tensor, sequence, pipeline, context, expert and data parallelism, each with another
EIGHT = {"tp2xpp2": DENSE, "tp2xcp2": DENSE, "overlap": DENSE, "ep4": EXPERTS, "tp2xep2": EXPERTS}


@in_places("ranks,layouts", cpu=[(4, {"tp2xpp2": ("llama",), "overlap": ("mixtral",)})], gpu8=[(8, EIGHT)])
def test_layouts_train_as_one_process(
    tmp_path: Path, place: str, ranks: int, layouts: dict[str, tuple[str, ...]]
) -> None:
    kinds = sorted({kind for of_one in layouts.values() for kind in of_one})
    for seed, kind in enumerate(kinds):
        family, changes = KINDS[kind]
        make_hf_model(tmp_path / kind, family, vocab_size=VOCAB, seed=seed, num_hidden_layers=2, **changes)  # type: ignore[arg-type]
    wanted = {kind: train_reference(tmp_path, kind) for kind in kinds}
    arguments = [f"{layout}={','.join(of_one)}" for layout, of_one in layouts.items()]
    done = program(place, TESTS / "models/training_program.py", tmp_path, *arguments, ranks=ranks)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    for layout, of_one in layouts.items():
        for kind in of_one:
            for ours, theirs in zip(found[layout][kind], wanted[kind], strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4), (layout, kind)
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), (layout, kind)
