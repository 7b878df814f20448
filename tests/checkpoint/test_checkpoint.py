"""A checkpoint is whole or not there, and goes on under any layout as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, python
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.checkpoint import manifest
from mrlhf.checkpoint.manifest import (
    HashBehind,
    _seal,
    await_files,
    check_manifest,
    file_entry,
    newest_whole,
    read_manifest,
    steps_in,
    write_manifest,
)
from mrlhf.checkpoint.save import Best, Keep, retain
from mrlhf.checkpoint.source import open_source
from mrlhf.errors import CheckpointError


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.jsonl"

    def meanwhile(_: Path) -> None:
        monkeypatch.undo()
        if (child := os.fork()) == 0:
            manifest.write_text(file, "another's")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and file.read_text() == "another's"

    monkeypatch.setattr(manifest, "fsync", meanwhile)
    manifest.write_text(file, "this one's")
    assert file.read_text() == "this one's" and list(tmp_path.iterdir()) == [file]


WHOLE = {"stage": "sft", "step": 1, "head": "lm", "dtype": "float32", "resumable": False}  # what every manifest has


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(world: Path, work: Path) -> dict[str, Any]:
    args = (TESTS / "checkpoint/checkpoint_program.py", world / "qwen2", world / "sft", work)
    result: dict[str, Any] = {}
    two = python(*args, ranks=2)
    try:
        with small_disk(work / "disk", 32) as disk:
            alone = python(*args, disk)
    except OSError as error:
        result["full disk"] = str(error)
        alone = python(*args)
    for done in (two, alone):
        result |= json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:]) | {
            "stderr": done.stderr
        }
    return result


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, "float32") for layout in ("pp2", "dp2", "tp2+sp", "interleaved", "cp2", "1")),
        ("pp2", "bfloat16"),
        ("1", "bfloat16"),
    ],
)
def test_goes_on_under_another_layout(found: dict[str, Any], layout: str, dtype: str) -> None:
    """Weights, both moments, the step count and the schedule: all enter the loss of the second step after the load."""
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    for ours, unbroken in zip(found[f"{layout} {dtype}"], found[f"tp2 {dtype}"], strict=True):
        assert ours["loss"] == pytest.approx(unbroken["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(unbroken["grad_norm"], rel=10 * tolerance)
        assert ours["lr"] == unbroken["lr"]
    assert found[f"{layout} {dtype}"][1]["loss"] < found["first"][0]["loss"]


def test_saved_by_an_interleaved_pipeline_and_gone_on_with_by_one_process(found: dict[str, Any]) -> None:
    for ours, unbroken in zip(found["after interleaved"], found["interleaved, unbroken"], strict=True):
        assert ours["loss"] == pytest.approx(unbroken["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(unbroken["grad_norm"], rel=1e-5)
        assert ours["lr"] == unbroken["lr"]


def test_a_checkpoint_of_format_2_is_read_resumed_and_exported(
    found: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    assert found["format 2"] == [2, True], "equal tensors"
    assert found["after format 2"] == found["1 float32"]
    for name in ("float32/checkpoints/step_2", "format_2"):
        python("-m", "mrlhf.export", work / name, tmp_path / name)
    new, old = (tmp_path / name / "model.safetensors" for name in ("float32/checkpoints/step_2", "format_2"))
    assert new.read_bytes() == old.read_bytes()


def test_failed_save_leaves_the_last_one(found: dict[str, Any]) -> None:
    assert found["after_failure"] == ["latest", "step_1", "step_2.tmp"]
    assert found["latest_after_failure"] == 1
    assert found["after_recovery"] == ["latest", "step_4", "step_5"], (
        "unfinished saves are cleared when the run starts again, the two newest kept"
    )


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    """By the lowest or highest value, the earliest of equals; without a value a checkpoint is never the best."""
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 1.0, 10: 2.0}

    def kept(best: Best | None, keep_last: int) -> list[str]:
        directory = tmp_path / f"{best} {keep_last}"
        for step, value in losses.items():
            (directory / f"step_{step}").mkdir(parents=True)
            write_manifest(directory / f"step_{step}", {**WHOLE, "eval": {} if value is None else {"eval/loss": value}})
            retain(directory, f"step_{step}", Keep(keep_last, best=best))
        assert (directory / "latest").read_text() == "step_10\n"
        if best is not None and best.metric == "eval/loss":
            assert (directory / "best").read_text() == ("step_1\n" if best.highest else "step_2\n")
        return sorted(p.name for p in directory.glob("step_*"))

    assert kept(None, 2) == ["step_10", "step_4"]
    assert kept(Best("eval/loss", False), 1) == ["step_10", "step_2"]
    assert kept(Best("eval/loss", True), 2) == ["step_1", "step_10", "step_4"]
    assert kept(Best("eval/other", True), 1) == ["step_10"]


def test_heads(found: dict[str, Any]) -> None:
    assert found["value_head"] == ["value", 5]
    assert found["value_reloaded"], "a value model's own head is loaded, not drawn"
    assert "no LM head" in found["value_to_lm"]
    assert found["fresh_head_same"], "an LM's fresh head depends on the seed only"
    assert found["body_kept"]


def test_read_in_another_dtype(found: dict[str, Any]) -> None:
    assert found["bfloat16_as_float32"] and found["float32_as_bfloat16"]
    assert found["to_resume"] == 2


@pytest.mark.parametrize("what", ["unstepped", "whole_optimizer"])
def test_other_optimizer_states(found: dict[str, Any], what: str) -> None:
    """An optimizer that has not stepped yet (an actor while its critic warms up),
    and use_distributed_optimizer false.
    """
    unbroken, resumed = found[what]
    assert resumed == unbroken


@pytest.fixture
def copied(found: dict[str, Any], work: Path, tmp_path: Path) -> Path:
    """A run's directory to damage."""
    return Path(shutil.copytree(work / "killed", tmp_path / "run"))


def test_damage_is_found_when_it_is_opened(copied: Path) -> None:
    assert open_source(str(copied)).path.name == "step_5"
    file = max((copied / "checkpoints/step_5/dist").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"dist/{file.name} has [\d,]+ bytes instead of [\d,]+"):
        open_source(str(copied))
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_source(str(copied))
    assert open_source(str(copied / "checkpoints/step_4")).manifest["step"] == 4


def test_every_file_truncated_flipped_and_deleted(copied: Path) -> None:
    """Each is found, named, and the checkpoint before it is taken: no silent load."""
    newest = copied / "checkpoints/step_5"
    names = [*read_manifest(newest)["files"], "mrlhf.json"]
    assert {
        "dist/.metadata",
        "dist/common.pt",
        "dist/metadata.json",
        "dist/__0_0.distcp",
        "hf/config.json",
        "rng/rank_0.json",
    } <= set(names)
    draw = random.Random(1)
    for name in names:
        path = newest / name
        whole = path.read_bytes()
        for kind in ("truncated", "flipped", "flipped", "deleted"):
            if kind == "deleted":
                path.unlink()
            elif kind == "truncated":
                path.write_bytes(whole[: draw.randrange(len(whole))])
            else:
                bit = draw.randrange(8 * len(whole))
                path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ (1 << bit % 8)]) + whole[bit // 8 + 1 :])
            found, problems = newest_whole(steps_in(newest.parent), verify="hash")
            assert found is not None and found.name == "step_4", (name, kind)
            assert name in str(problems[0]), (name, kind)
        path.write_bytes(whole)
    assert newest_whole(steps_in(newest.parent), verify="hash") == (newest, [])
    text = (newest / "mrlhf.json").read_bytes()
    for bit in draw.sample(range(8 * len(text)), 300):  # every place of the manifest: sealed
        (newest / "mrlhf.json").write_bytes(
            text[: bit // 8] + bytes([text[bit // 8] ^ (1 << bit % 8)]) + text[bit // 8 + 1 :]
        )
        with pytest.raises(CheckpointError):
            read_manifest(newest)


@pytest.mark.parametrize(
    "odd",
    [{"files": None}, {"files": {"a": 1}}, {"files": {"a": {"size": "1", "sha256": ""}}}, {"files": []}, {"step": "5"},
     {"files": {"a\ud800": {"size": 1, "sha256": ""}}}, {"head": None}, {"dtype": "int4"}, {"step": 10**400},
     {"layout": None}, {"recent_losses": 3}, {"scheduler": []}, {"eval": [1]}, {"data": {}}, {"step": None},
     {"x": json.loads("[" * 300 + "]" * 300)}, {"hf_dtypes": {"w": "complex64"}}],
)  # fmt: skip
def test_an_odd_manifest_with_its_own_checksum_is_passed_over(tmp_path: Path, odd: dict[str, Any]) -> None:
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        write_manifest(tmp_path / f"step_{step}", WHOLE)
    path = tmp_path / "step_2/mrlhf.json"
    content = {**json.loads(path.read_text()), **odd}
    path.write_text(json.dumps({**content, "seal": _seal(content)}))
    newest, problems = newest_whole(steps_in(tmp_path), verify="hash")
    assert newest == tmp_path / "step_1" and len(problems) == 1 and str(path) in str(problems[0])
    with pytest.raises(CheckpointError):
        open_source(str(tmp_path / "step_2"))
    path.write_text("[" * 10**6)
    assert newest_whole(steps_in(tmp_path), verify="hash")[0] == tmp_path / "step_1"


def test_a_save_in_the_background_is_the_one_in_the_foreground(found: dict[str, Any]) -> None:
    saves = found["saves"]
    same, files = saves["same bytes"]
    assert same and files >= 9
    assert saves["while it is written"] == ["step_1.tmp"]
    assert saves["when the next has begun"] == [["latest", "step_1", "step_2.tmp"], "step_1\n"], (
        "the next waits for the one before"
    )
    assert saves["background"] == [["latest", "step_1", "step_2"], "step_2\n"]


def test_a_save_that_fails(found: dict[str, Any]) -> None:
    """EFBIG of the real write, an announced lack of room, EACCES: by policy, and what was there stays."""
    saves = found["saves"]
    for what in ("stop, front", "stop, background", "continue, last"):
        assert "cannot be saved: rank 0: " in saves[what] and "File too large" in saves[what], what
        assert "earlier checkpoints are untouched" in saves[what]
    assert saves["continue"] == "none"
    assert saves["full"] == [["latest", "step_1"], ["latest", "step_1", "step_2"]]
    assert "10,000 are free" in saves["no room"]
    assert "Permission denied" in saves["forbidden"]
    assert saves["after all"] == ["latest", "step_1"] and saves["mended"] == ["latest", "step_1", "step_3"]


def test_a_disk_that_fills_up_during_a_save(found: dict[str, Any]) -> None:
    """ENOSPC of a small tmpfs, before and after the check of free space: in front and in the background, by policy."""
    disk = found["full disk"]
    if isinstance(disk, str):
        pytest.skip(f"this process may not mount a small disk: {disk}")
    assert len(disk["saves"]) == 16
    for what, save in disk["saves"].items():
        moment, _, policy = what.split(", ")
        assert ("No space left on device" in save["error"]) == (policy == "stop"), what
        assert save["error"] == "none" or "earlier checkpoints are untouched" in save["error"], what
        there = ["step_1", "step_2"] if moment == "pointer" else ["step_1"]  # there it was whole already
        assert save["untouched"] and save["latest"] == "step_1\n" and save["last step"] == 0, what
        assert [name for name in save["left"] if name != "latest.tmp"] == ["latest", *there], what
        assert save["next start"] == ["latest", *there], what
    assert disk["mended"] == ["latest", "step_1", "step_3"], "and it went on from the first one"


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(found: dict[str, Any]) -> None:
    assert found["saves"]["fell back to"] == "step_1"
    assert (
        "warning: not whole, passed over: " in found["stderr"]
        and "dist/common.pt has 0 bytes instead of" in found["stderr"]
    )
    none = found["saves"]["none whole"]
    assert (
        "no checkpoint of this run is whole" in none
        and "dist/common.pt" in none
        and "hf/config.json is missing" in none
    )


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 30), st.booleans(), st.floats(0, 9)), min_size=1, max_size=8, unique_by=lambda s: s[0]
    ),
    last=st.integers(1, 3),
    every=st.sampled_from([0, 2, 5]),
    best=st.booleans(),
)
def test_what_is_kept(steps: list[tuple[int, bool, float]], last: int, every: int, best: bool) -> None:
    """Whatever is damaged: the newest, the newest `last` whole ones, every whole multiple and the best stay;
    nothing whole goes for a damaged one.
    """
    with tempfile.TemporaryDirectory() as made:
        directory, steps = Path(made), sorted(steps)
        steps[-1] = (steps[-1][0], True, steps[-1][2])  # has just been written
        for step, whole, loss in steps:
            folder = directory / f"step_{step}"
            folder.mkdir()
            (folder / "file").write_text("x")
            write_manifest(folder, {**WHOLE, "eval": {"eval/loss": loss}})
            if not whole:
                (folder / "file").write_text("xx")
        retain(directory, f"step_{steps[-1][0]}", Keep(last, every, Best("eval/loss", False) if best else None))
        left = {int(p.name[5:]) for p in directory.glob("step_*")}
        good = [step for step, whole, _ in steps if whole]
        wanted = {*good[-last:], *(s for s in good if every and s % every == 0)}
        if best:
            wanted.add(min((loss, step) for step, whole, loss in steps if whole)[1])
            assert int((directory / "best").read_text()[5:]) in left
        assert left == wanted
        assert newest_whole(steps_in(directory), verify="hash")[0] == directory / f"step_{steps[-1][0]}"


def test_of_a_link_the_link_alone_is_dropped(tmp_path: Path) -> None:
    for name in ("elsewhere", "run/step_2"):
        (tmp_path / name).mkdir(parents=True)
        write_manifest(tmp_path / name, WHOLE)
    (tmp_path / "run/step_1").symlink_to(tmp_path / "elsewhere")
    retain(tmp_path / "run", "step_2", Keep(1))
    assert (
        sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "step_2"]
        and (tmp_path / "elsewhere/mrlhf.json").is_file()
    )


def test_latest_that_points_nowhere(copied: Path) -> None:
    (copied / "checkpoints/latest").write_text("step_77\n")
    assert open_source(str(copied)).path.name == "step_5"
    (copied / "checkpoints/latest").write_text("../../etc\n")
    assert open_source(str(copied / "checkpoints")).path.name == "step_5"
    (copied / "checkpoints/step_5/mrlhf.json").unlink()
    with pytest.raises(CheckpointError, match=r"mrlhf\.json is missing"):
        open_source(str(copied))


def test_files_that_come_late_to_a_rank_are_waited_for(tmp_path: Path) -> None:
    """The manifest and a file, as a shared file system may show them; not for ever, and never for a wrong size."""
    checkpoint, late = tmp_path / "step_1", {"mrlhf.json": 0.2, "dist/file": 0.4}
    (checkpoint / "dist").mkdir(parents=True)
    (checkpoint / "dist/file").write_text("x")
    write_manifest(checkpoint, WHOLE)
    start = time.monotonic()
    for name, seconds in late.items():
        hidden = tmp_path / Path(name).name
        (checkpoint / name).rename(hidden)
        threading.Timer(seconds, hidden.rename, [checkpoint / name]).start()
    await_files(checkpoint, patience_s=20)
    assert 0.4 <= time.monotonic() - start < 10
    assert "dist/file" in check_manifest(checkpoint, verify="hash")["files"]
    (checkpoint / "dist/file").write_text("xx")
    await_files(checkpoint, patience_s=20)
    assert time.monotonic() - start < 10
    (checkpoint / "dist/file").unlink()
    await_files(checkpoint, patience_s=0.2)
    with pytest.raises(CheckpointError, match="dist/file is missing"):
        check_manifest(checkpoint, verify="size")


def test_other_things_are_refused(copied: Path, tmp_path: Path) -> None:
    manifest = copied / "checkpoints/step_5/mrlhf.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(whole), "step": 6}))
    with pytest.raises(CheckpointError, match="checksum differs from its own"):
        open_source(str(copied))
    manifest.write_text(json.dumps({**json.loads(whole), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        open_source(str(copied))
    write_manifest(manifest.parent, json.loads(whole))
    assert open_source(str(copied), verify="hash").manifest["step"] == 5
    found = json.loads(whole)
    found["files"]["../step_4/mrlhf.json"] = {"size": 1, "sha256": ""}
    manifest.write_text(json.dumps({**found, "seal": _seal(found)}))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_source(str(copied))
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="not the JSON"):
        open_source(str(copied))
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a HF model"):
        open_source(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such directory"):
        open_source(str(tmp_path / "nothing"))


def test_hash_behind_the_writer(tmp_path: Path) -> None:
    """In pieces, with a stretch that was written twice before it was given up,
    and a file that is shorter than was said.
    """
    data = bytes(range(256)) * 40_000
    path = tmp_path / "file"
    with path.open("w+b", buffering=0) as file:
        behind = HashBehind(path)
        for at in range(0, len(data), 3_000_000):
            file.write(b"x" * 1000)
            file.seek(at)
            file.write(data[at : at + 3_000_000])
            behind.up_to(file.tell())
        assert behind.entry(len(data)) == file_entry(path)
    with pytest.raises(OSError, match="shorter"):
        HashBehind(path).entry(len(data) + 1)
