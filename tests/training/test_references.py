"""DPO's reference log-probs: whole or not there, of this data and this reference or computed anew,
read again by another run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import metrics, mrlhf
from safetensors.torch import load_file

from mrlhf.observe.metrics import EVALUATED
from mrlhf.training.reference_cache import read_logps, write_logps, write_to_first

FACTS = {"data": "d" * 64, "reference": "r" * 64}
LOGPS = torch.tensor([-1.5, -20.25, -3.0])


def test_what_was_written_is_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "pref_reference_0.safetensors"
    assert read_logps(path, facts=FACTS, samples=3) is None
    write_logps(path, LOGPS, facts=FACTS)
    found = read_logps(path, facts=FACTS, samples=3)
    assert isinstance(found, torch.Tensor) and torch.equal(found, LOGPS)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    assert read_logps(path, facts=FACTS | {"data": "e" * 64}, samples=3) == "is of another data"
    assert read_logps(path, facts=FACTS | {"reference": "s" * 64}, samples=3) == "is of another reference"
    assert read_logps(path, facts=FACTS, samples=4) == "is damaged: its values are not those that were written"
    whole = path.read_bytes()
    for at in range(len(whole)):  # header, metadata, values: no flipped byte gives other values
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = read_logps(path, facts=FACTS, samples=3)
        assert isinstance(found, str) or torch.equal(found, LOGPS), at
    path.write_bytes(whole[:-1])
    assert str(read_logps(path, facts=FACTS, samples=3)).startswith("cannot be read (")


def test_where_the_data_cannot_be_written_the_run_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [Path("/proc/pref_reference_0.safetensors"), tmp_path / "run/pref_reference_0_d.safetensors"]
    assert write_to_first(paths, LOGPS, facts=FACTS) == paths[1]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("/proc cannot be written (") and str(paths[1]) in said[0]
    found = read_logps(paths[1], facts=FACTS, samples=3)
    assert isinstance(found, torch.Tensor) and torch.equal(found, LOGPS)


def test_a_later_run_reads_them(world: Path, tmp_path: Path) -> None:
    """Two sources; one's file is lost between the runs, the other is read.
    Summed log-probs serve the length-normalised loss too.
    """
    for name in ("a", "b"):
        for file in world.glob("pref[._]*"):
            if file.suffix in (".bin", ".idx", ".json"):
                shutil.copy(file, tmp_path / file.name.replace("pref", name, 1))
    blend = f"[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    args = ["dpo", "--model.path", world / "qwen2", "--model.dtype", "float32", "--data.train", blend,
            "--train.global_batch_size", 4, "--train.max_steps", 2, "--checkpoint.save_optimizer", "false"]  # fmt: skip
    first = mrlhf(*args, "--train.output_dir", tmp_path / "first", "--data.eval", tmp_path / "a")
    a, b = (next(tmp_path.glob(f"{name}_reference_*.safetensors")) for name in ("a", "b"))
    assert a.name[1:] == b.name[1:] and first.stdout.count("answers of") == 2, (
        "the evaluation split is one of the sources"
    )
    assert not list((tmp_path / "first").glob("*reference*"))
    lines = metrics(tmp_path / "first")
    assert lines[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert {k.removeprefix("eval/") for k in lines[-1] if k != "step"} == set(EVALUATED["dpo"])
    before = load_file(a)["logps"]
    a.unlink()
    again = mrlhf(
        *args, "--train.output_dir", tmp_path / "again", "--dpo.length_normalize", "true", "--dpo.loss", "ipo"
    )
    assert f"reference log-probs: {b}" in again.stdout and f"answers of {tmp_path / 'a'}" in again.stdout
    assert torch.allclose(load_file(a)["logps"], before)
    assert metrics(tmp_path / "again")[0]["train/loss"] == pytest.approx(25, rel=1e-5), (
        "(0 - 1 / (2 beta))^2 with beta 0.1"
    )
