"""What can go wrong in a conversion: kills, damaged files, several ranks, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS, load_benchmark, make_hf_model, python, run
from safetensors.torch import load_file, save_file
from zoo import MOE

from mrlhf.checkpoint.save import clear_unfinished
from mrlhf.observe.directory import DirectoryLock

KILL = TESTS / "convert/convert_kill_program.py"
PARAMETERS = 2 * 7 + 3  # of the zoo's qwen2
RANKS = ("qwen2_tied", "gpt2", "gemma2", "qwen3_moe_mixed", "deepseek_v3")


def files(directory: Path) -> dict[str, bytes]:
    """Of a checkpoint without what a save notes about itself."""
    found = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name not in ("mrlhf.json", "dist/.metadata")}


def test_a_killed_conversion_goes_on_where_it_stood(zoo: Path, tmp_path: Path) -> None:
    def start(direction: str, source: Path, target: str, count: int) -> subprocess.CompletedProcess[str]:
        return python(KILL, direction, source, tmp_path / target, count, check=False)

    whole = start("import", zoo / "qwen2", "whole", 0)
    assert whole.stdout.split()[-1] == str(PARAMETERS)
    cases = (("import", zoo / "qwen2", "whole"), ("export", tmp_path / "whole", zoo / "qwen2"))
    for direction, source, expected in cases:
        killed = start(direction, source, direction, 4)
        assert killed.returncode == -9
        assert not (tmp_path / direction).exists() and (tmp_path / f"{direction}.tmp").is_dir()
        last = start(direction, source, direction, 0)
        assert last.stdout.split()[-1] == str(PARAMETERS - 4) and "continuing the conversion in" in last.stderr
        assert not (tmp_path / f"{direction}.tmp").exists() and not list((tmp_path / direction).rglob("progress*"))
        assert files(tmp_path / direction) == files(tmp_path / expected)


def test_what_was_begun_from_other_inputs_begins_anew(zoo: Path, tmp_path: Path) -> None:
    source = shutil.copytree(zoo / "qwen2", tmp_path / "hf")
    assert python(KILL, "import", source, tmp_path / "out", 5, check=False).returncode == -9
    os.utime(source / "model.safetensors", (1, 1))
    last = python(KILL, "import", source, tmp_path / "out", 0)
    assert last.stdout.split()[-1] == str(PARAMETERS) and "continuing the conversion in" not in last.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_conversions_do_not_write_one_output(ranks: int, zoo: Path, tmp_path: Path) -> None:
    """And a run that starts leaves the directory of an export that still runs."""
    out, arguments = tmp_path / "hf/out", ("--hf", zoo / "qwen2", "--output", tmp_path / "hf/out")
    with DirectoryLock(tmp_path / "hf/out.tmp/lock", key="--output", fix="") as lock:
        theirs = [lock.file.with_name(f"progress_{rank}.jsonl") for rank in range(2)]
        for file in theirs:
            file.write_text("of the other")
        refused = python("tools/convert/hf_to_megatron.py", *arguments, ranks=ranks, check=False)
        assert refused.returncode in (1, 2) and f"pid {os.getpid()}" in refused.stderr
        assert "is writing there" in refused.stderr and not out.exists()
        clear_unfinished(out.parent)
        assert [file.read_text() for file in theirs] == ["of the other"] * 2
    if ranks == 1:
        python("tools/convert/hf_to_megatron.py", *arguments)
        assert not list(out.rglob("lock")) and not lock.file.exists()


def test_several_ranks_share_the_work(zoo: Path, tmp_path: Path) -> None:
    """The files do not depend on how many they were, and the checkpoints load under other layouts."""
    odd = tmp_path / "odd"
    make_hf_model(odd, "llama", vocab_size=323, num_hidden_layers=3)
    done = python(TESTS / "convert/convert_ranks_program.py", zoo, tmp_path, *RANKS, odd, ranks=2)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    expert_parallel = {f"{kind} tp 1 ep 2" for kind in RANKS if kind in MOE}
    assert set(found) == {f"{kind} tp 2 ep 1" for kind in RANKS} | expert_parallel
    assert files(tmp_path / "odd.hf") == files(odd)
    assert max(found.values()) < 1e-5
    for kind in RANKS:
        assert len(list((tmp_path / f"{kind}.mrlhf/dist").glob("*.distcp"))) == 2
        assert files(tmp_path / f"{kind}.hf") == files(zoo / kind)
    tool = (sys.executable, "tools/convert/hf_to_megatron.py")
    alone = run("env", "WORLD_SIZE=3", *tool, "--hf", zoo / "gpt2", "--output", tmp_path / "x", check=False)
    assert alone.returncode == 2 and "3 ranks cannot share 2 layers" in alone.stderr


def test_memory_is_that_of_the_largest_tensor_not_of_the_model(tmp_path: Path) -> None:
    """Two copies of the largest tensor (`Skeleton.ahead`) plus the threads' and the allocator's: at most four.

    The model has more than twenty of them, so one copy of it, or of half its layers, would be far over.
    """
    benchmark = load_benchmark("convert")
    largest = 8000 * 512 * 2
    benchmark.HIDDEN, benchmark.FFN, benchmark.VOCAB, benchmark.HEADS = 512, 2048, 8000, 8
    nbytes = benchmark.make(tmp_path / "hf", 20)
    there = benchmark.run("import", tmp_path / "hf", tmp_path / "megatron")
    back = benchmark.run("export", tmp_path / "megatron", tmp_path / "back")
    assert nbytes > 20 * largest
    for row in (there, back):
        assert row["peak_bytes"] - row["base_bytes"] < 4 * largest, row


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small llama in two files."""
    make_hf_model(tmp_path / "hf", "llama", vocab_size=64, num_hidden_layers=1)
    tensors = sorted(load_file(tmp_path / "hf/model.safetensors").items())
    (tmp_path / "hf/model.safetensors").unlink()
    index = {}
    for i, part in enumerate((tensors[:6], tensors[6:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file(dict(part), tmp_path / "hf" / file, metadata={"format": "pt"})
        index |= {name: file for name, _ in part}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path / "hf"


def damage(directory: Path, how: str) -> None:
    second, index = directory / "model-00002-of-00002.safetensors", directory / "model.safetensors.index.json"
    data = bytearray(second.read_bytes())
    if how == "truncated":
        os.truncate(second, len(data) - 10)
    elif how == "empty":
        os.truncate(second, 3)
    elif how == "header length":
        data[5] ^= 0x10
        second.write_bytes(data)
    elif how == "header text":
        data[data.index(b"data_offsets")] ^= 0x02
        second.write_bytes(data)
    elif how == "shape":
        second.write_bytes(bytes(data).replace(b'"shape":[128,128]', b'"shape":[128,127]', 1))
    elif how == "not finite":
        tensors = load_file(second)
        tensors["model.norm.weight"][3] = float("inf")
        save_file(tensors, second, metadata={"format": "pt"})
    elif how == "missing shard":
        second.unlink()
    elif how == "index is not JSON":
        index.write_text("{")
    elif how == "index names a stray":
        found = json.loads(index.read_text())
        found["weight_map"]["model.layers.7.mlp.up_proj.weight"] = second.name
        index.write_text(json.dumps(found))
    elif how == "weights of another config":
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 4}))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("truncated", ["model-00002", "model.norm.weight", "not whole"]),
        ("empty", ["model-00002"]),
        ("header length", ["model-00002", "header"]),
        ("header text", ["model-00002"]),
        ("shape", ["model-00002", "self_attn."]),
        ("not finite", ["model-00002", "model.norm.weight", "not finite"]),
        ("missing shard", ["model.safetensors.index.json", "model-00002", "self_attn.k_proj.weight"]),
        ("index is not JSON", ["model.safetensors.index.json"]),
        ("index names a stray", ["model.layers.7.mlp.up_proj.weight"]),
        ("weights of another config", ["self_attn.k_proj.weight (64, 128) instead of (128, 128)"]),
    ],
)
def test_damaged_hf_files_name_file_and_tensor(sharded: Path, how: str, names: list[str]) -> None:
    from mrlhf.checkpoint.source import open_source
    from mrlhf.errors import CheckpointError
    from mrlhf.models.families.slices import TensorSlice
    from mrlhf.models.hf_files import HFReader

    def read_all() -> None:
        source = open_source(str(sharded))
        reader = HFReader(source.path, source.spec, head="lm")
        for name, tensor in reader.tensors.items():
            reader.read(TensorSlice(name, 0, 0, tensor.shape[0], 0))
        reader.close()

    read_all()
    damage(sharded, how)
    with pytest.raises(CheckpointError) as caught:
        read_all()
    assert all(name in str(caught.value) for name in names), str(caught.value)
