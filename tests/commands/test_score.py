"""`mrlhf score` gives what transformers gives, in data order, under every layout, packed or padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TESTS, mrlhf, python

from commands.score_program import CASES
from mrlhf.checkpoint.manifest import read_manifest, write_manifest
from mrlhf.data.indexed import PackedDataset

MEAN, STD = 0.25, 2.0


@pytest.fixture(scope="module")
def value(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A value checkpoint with the reward statistics that rm.py writes."""
    path = tmp_path_factory.mktemp("value") / "step_0"
    python("tools/convert/hf_to_megatron.py", "--hf", world / "qwen2", "--output", path, "--head", "value", "--seed", 4)
    write_manifest(path, {**read_manifest(path), "reward_mean": MEAN, "reward_std": STD})
    return path


@pytest.fixture(scope="module")
def out(world: Path, value: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scores")
    python(TESTS / "commands/score_program.py", world, value, directory, ranks=2)
    return directory


@pytest.fixture(scope="module")
def reference(world: Path, value: Path) -> dict[str, list[Any]]:
    """transformers, one sample at a time: {"sft": [log-probs of every sample], "value sft": [scores], ...}."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from mrlhf.models.families import spec_from_hf
    from mrlhf.models.families.spec import read_hf_config
    from mrlhf.models.gpt import RandomSource

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(world / "qwen2", dtype=torch.float32)
    assert "score.weight" not in load_file(world / "qwen2/model.safetensors")
    head = RandomSource(spec_from_hf(read_hf_config(world / "qwen2"), where="qwen2"), head="value", seed=4)._tensor(
        "score.weight"
    )
    found: dict[str, list[Any]] = {}
    for name in ("sft", "pref", "prompts"):
        data = PackedDataset.open(world / name)
        for i in range(data.num_samples):
            ids = torch.from_numpy(data.tokens(i))
            with torch.no_grad():
                hidden = model.model(ids[None]).last_hidden_state[0]
                logits = model.lm_head(hidden)
            for key, temperature in (("", 1.0), (" tempered", 0.5)):
                logps = torch.log_softmax(logits[:-1] / temperature, -1).gather(-1, ids[1:, None])[:, 0]
                found.setdefault(name + key, []).append(logps.tolist())
            found.setdefault(f"value {name}", []).append(float(hidden[-1] @ head[0]))
    return found


def check_entry(entry: dict[str, Any], data: PackedDataset, index: int, wanted: Any, kind: str) -> None:
    if kind == "value":
        assert set(entry) - {"index"} == {"score", "normalized"}
        assert entry["score"] == pytest.approx(wanted, abs=1e-4)
        assert entry["normalized"] == pytest.approx((wanted - MEAN) / STD, abs=1e-4)
        return
    assert set(entry) - {"index"} == {"tokens", "mask", "logprobs"}
    assert entry["tokens"] == data.tokens(index).tolist()
    assert entry["mask"] == (data.mask(index).tolist() if data.has_mask else [0] * len(entry["tokens"]))
    assert entry["logprobs"][0] is None and len(entry["logprobs"]) == len(entry["tokens"])
    assert entry["logprobs"][1:] == pytest.approx(wanted, abs=1e-4)


def check_file(path: Path, world: Path, name: str, kind: str, wanted: list[Any]) -> None:
    data = PackedDataset.open(world / name)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = name == "pref"
    assert [line["index"] for line in lines] == list(range(data.num_samples // (2 if pairs else 1)))
    for i, line in enumerate(lines):
        if pairs:
            assert set(line) == {"index", "chosen", "rejected"}
            check_entry(line["chosen"], data, 2 * i, wanted[2 * i], kind)
            check_entry(line["rejected"], data, 2 * i + 1, wanted[2 * i + 1], kind)
        else:
            check_entry(line, data, i, wanted[i], kind)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_under_every_layout(
    world: Path, out: Path, reference: dict[str, list[Any]], case: str
) -> None:
    data, kind, _, options = CASES[case]
    key = f"value {data}" if kind == "value" else data + (" tempered" if "temperature" in options else "")
    check_file(out / f"{case}.jsonl", world, data, kind, reference[key])


def test_nothing_temporary_is_left(out: Path) -> None:
    assert sorted(p.stem for p in out.iterdir()) == sorted(CASES)


def test_command_line(world: Path, value: Path, reference: dict[str, list[Any]], tmp_path: Path) -> None:
    """Without --dtype: in the dtype of the checkpoint, fp32."""
    output = tmp_path / "new" / "scores.jsonl"
    done = mrlhf("score", "--checkpoint", world / "qwen2", "--data", world / "sft", "--output", output)
    assert f"48 samples -> {output}" in done.stdout
    check_file(output, world, "sft", "lm", reference["sft"])
    for line, wanted in zip(output.read_text().splitlines(), reference["sft"], strict=True):
        assert json.loads(line)["logprobs"][1:] == pytest.approx(wanted, abs=1e-5)
    mrlhf("score", "--checkpoint", value, "--data", world / "sft", "--output", output)
    scores = [json.loads(line)["score"] for line in output.read_text().splitlines()]
    assert scores == pytest.approx(reference["value sft"], abs=1e-5)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("one in float32", "float32")],
)
def test_the_dtype_of_a_model_is_that_of_its_files(world: Path, tmp_path: Path, stored: str, wanted: str) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from mrlhf.checkpoint.source import open_source

    shutil.copytree(world / "qwen2", tmp_path / "model")
    kinds = {"one in float32": torch.bfloat16}
    kind = kinds[stored] if stored in kinds else getattr(torch, stored)
    tensors = {k: v.to(kind) for k, v in load_file(world / "qwen2/model.safetensors").items()}
    if stored in kinds:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    assert open_source(str(tmp_path / "model")).dtype == wanted


def test_the_dtype_of_a_checkpoint_is_in_its_manifest(value: Path, tmp_path: Path) -> None:
    from mrlhf.checkpoint.source import open_source

    for dtype in ("float32", "bfloat16"):
        write_manifest(value, {**read_manifest(value), "dtype": dtype})
        assert open_source(str(value)).dtype == dtype
    write_manifest(value, {**read_manifest(value), "dtype": "float32"})


def test_every_problem_at_once(world: Path, tmp_path: Path) -> None:
    import shutil

    from conftest import make_tokenizer

    from mrlhf.commands.score import check_score
    from mrlhf.config.options import ParallelConfig, ScoreStage
    from mrlhf.errors import SeveralErrors

    shutil.copytree(world / "qwen2", tmp_path / "model")
    make_tokenizer(tmp_path / "model", ["other words"], vocab_size=300)
    stage = ScoreStage(
        checkpoint=str(tmp_path / "model"),
        data=str(world / "sft"),
        output=str(tmp_path),
        padding_side="left",
        temperature=0.0,
        parallel=ParallelConfig(tensor_model_parallel_size=3),
    )
    with pytest.raises(SeveralErrors) as caught:
        check_score(stage, 3)
    text = str(caught.value)
    for part in (
        "tensor_model_parallel_size = 3",
        "temperature = 0",
        "needs packing false",
        "left is for value heads",
        "tokenizer",
        "is a directory",
    ):
        assert part in text, part
    with pytest.raises(SeveralErrors) as caught:
        check_score(
            ScoreStage(checkpoint=str(tmp_path / "no"), data=str(tmp_path / "no"), output=str(tmp_path / "x")), 1
        )
    assert "no such directory" in str(caught.value) and "no such dataset" in str(caught.value)
