"""HF -> Megatron -> HF is bit for bit, transformers agrees on every export, and the tools say what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TESTS, make_hf_model, make_tokenizer, python
from safetensors.torch import load_file, save_file
from zoo import KINDS, VOCAB, samples

TOOLS = "tools/convert"
MORE = ("bf16", "fp16", "mixed", "sharded", "tied_with_copy", "bare_names")


@pytest.fixture(scope="module")
def zoo(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo, and models of it in other dtypes and file layouts; all with a tokenizer."""
    root = shutil.copytree(zoo, tmp_path_factory.mktemp("convert") / "zoo")
    make_tokenizer(root / "qwen2", ["red green blue one two three"])
    known = ("config.json", "model.safetensors", "generation_config.json")
    extra = [f.name for f in (root / "qwen2").iterdir() if f.name not in known]
    for kind in set(KINDS) - {"qwen2"}:
        for name in extra:
            shutil.copy(root / "qwen2" / name, root / kind / name)

    def variant(name: str, base: str, kind: torch.dtype, *, keep: str = "", **config: Any) -> dict[str, torch.Tensor]:
        shutil.copytree(root / base, root / name)
        path = root / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}, indent=2) + "\n")
        tensors = load_file(root / base / "model.safetensors")
        return {k: v if keep and keep in k else v.to(kind) for k, v in tensors.items()}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})

    write("bf16", variant("bf16", "qwen3", torch.bfloat16, dtype="bfloat16"))
    write("fp16", variant("fp16", "llama", torch.float16, dtype="float16"))
    write("mixed", variant("mixed", "qwen2", torch.bfloat16, keep="norm", dtype="bfloat16"))
    tied = variant("tied_with_copy", "qwen2_tied", torch.float32)
    write("tied_with_copy", {**tied, "lm_head.weight": tied["model.embed_tokens.weight"].clone()})
    bare = variant("bare_names", "gpt2", torch.float32)  # as the files of the hub's gpt2
    write("bare_names", {name.removeprefix("transformer."): tensor for name, tensor in bare.items()})
    sharded = list(variant("sharded", "llama", torch.float32).items())
    (root / "sharded/model.safetensors").unlink()
    index = {}
    for i, part in enumerate((sharded[::2], sharded[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file(dict(part), root / "sharded" / file, metadata={"format": "pt"})
        index |= dict.fromkeys((k for k, _ in part), file)
    (root / "sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def found(zoo: Path, work: Path) -> dict[str, Any]:
    done = python(TESTS / "convert/convert_program.py", zoo, work)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_there_and_back_gives_every_file_byte_for_byte(found: dict[str, Any], zoo: Path, work: Path, kind: str) -> None:
    files = sorted(f.name for f in (zoo / kind).iterdir())
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
    assert set(names) <= set(files)
    assert sorted(f.name for f in (work / f"{kind}.hf").iterdir()) == files
    for name in files:
        if kind == "tied_with_copy" and name.endswith(".safetensors"):
            before, after = tensors_of(zoo / kind), tensors_of(work / f"{kind}.hf")
            assert set(before) - set(after) == {"lm_head.weight"}, "config.json says that it is the embedding"
            assert all(torch.equal(before[k], v) for k, v in after.items())
        else:
            assert (zoo / kind / name).read_bytes() == (work / f"{kind}.hf" / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_in_bfloat16(found: dict[str, Any], zoo: Path, work: Path, kind: str) -> None:
    """Of every family; the fp32 model is rounded on the way in, and what comes out goes there and back once more."""
    once, twice = tensors_of(work / f"{kind}.bf16.hf"), tensors_of(work / f"{kind}.bf16.again")
    assert set(once) == set(tensors_of(zoo / kind))
    for name, tensor in tensors_of(zoo / kind).items():
        stays = name.endswith("e_score_correction_bias")  # as transformers keeps it
        assert torch.equal(tensor if stays else tensor.bfloat16(), once[name]), name
    assert all(torch.equal(tensor.view(torch.uint8), twice[name].view(torch.uint8)) for name, tensor in once.items())


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_the_checkpoint_computes_what_transformers_does(found: dict[str, Any], kind: str) -> None:
    dtype, head, difference = found[kind]
    assert (dtype, head) == ("bfloat16" if kind == "bf16" else "float32", "lm")
    assert difference < 1e-5


def test_tied_stays_tied(found: dict[str, Any], work: Path) -> None:
    assert "lm_head.weight" not in tensors_of(work / "qwen2_tied.hf")
    assert tensors_of(work / "qwen2_tied.hf")["model.embed_tokens.weight"].shape[0] == VOCAB, "no padding rows"


@pytest.mark.parametrize("kind", ["llama3_rope", "qwen2_tied"])
def test_transformers_loads_the_export(found: dict[str, Any], zoo: Path, work: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        work / f"{kind}.hf", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    for ids, wanted in zip(samples(), torch.load(zoo / f"{kind}.pt"), strict=True):
        with torch.no_grad():
            assert torch.equal(model(ids[None]).logits[0], wanted)


def test_value_model_becomes_a_classifier_with_the_same_scores(found: dict[str, Any], work: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    assert found["value"] < 1e-5 and found["value beside its LM"] < 1e-5
    assert found["value head"][0] == "value" and found["value head"][1] < 1e-5
    assert "1.5" in found["value notes"][0]
    model, info = AutoModelForSequenceClassification.from_pretrained(work / "rm.hf", output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == "Qwen2ForSequenceClassification"
    assert model.num_labels == 1 and model.config.pad_token_id == 0
    ids = samples()
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    with torch.no_grad():
        together = model(padded, attention_mask=padded != 0).logits[:, 0]
        alone = torch.stack([model(row[None]).logits[0, 0] for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    again = tensors_of(work / "rm2.hf")
    assert all(torch.equal(v, again[k]) for k, v in tensors_of(work / "rm.hf").items())
    assert (work / "rm.hf/config.json").read_bytes() == (work / "rm2.hf/config.json").read_bytes()


def test_runs_and_their_parts(found: dict[str, Any], zoo: Path, work: Path) -> None:
    assert "lm_head.weight" in tensors_of(work / "actor.hf")
    card = (work / "actor.hf/README.md").read_text()
    assert "(PPO)" in card and "step 5" in card and "data/prompts" in card and f"path: {zoo / 'qwen2'}" in card
    assert "| critic/score/mean | 0.75 |" in card and card.startswith("---\nlibrary_name: transformers\n")
    critic = tensors_of(work / "critic.hf")
    assert critic["score.weight"].shape == (1, 128) and "lm_head.weight" not in critic
    half = tensors_of(work / "half.hf")
    assert {v.dtype for v in half.values()} == {torch.bfloat16}
    assert all(torch.equal(v.bfloat16(), half[k]) for k, v in tensors_of(zoo / "qwen2").items())
    before, after = (json.loads((d / "config.json").read_text()) for d in (zoo / "qwen2", work / "half.hf"))
    assert after == {**before, "dtype": "bfloat16"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_export_in_another_dtype(found: dict[str, Any], zoo: Path, work: Path, dtype: str) -> None:
    assert found[f"as {dtype}"] < 1e-5, "compared with the rounding on both sides"
    config = json.loads((work / f"{dtype}.hf/config.json").read_text())
    original = json.loads((zoo / "qwen2/config.json").read_text())
    assert config.pop("dtype") == dtype and config.items() <= original.items()
    if dtype != "float32":  # those were damaged on purpose
        after = tensors_of(work / f"{dtype}.hf")
        assert all(torch.equal(v.to(getattr(torch, dtype)), after[k]) for k, v in tensors_of(zoo / "qwen2").items())


def test_narrower_import(found: dict[str, Any]) -> None:
    assert found["narrow"][0] == "bfloat16" and found["narrow"][1] < 1e-5


def test_a_wrong_mapping_shows(found: dict[str, Any]) -> None:
    assert found["swapped heads"] is False


def test_refusals(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert all(text.startswith("CheckpointError: ") for text in refused.values()), refused
    assert "float16" in refused["overflow"] and "exists" in refused["existing"] and "exists" in refused["existing hf"]
    assert "already" in refused["checkpoint as hf"] and "not a mrlhf checkpoint" in refused["hf as checkpoint"]
    assert "no critic" in refused["no critic"] and "no LM head" in refused["value as lm"]
    assert "different models" in refused["other model"]
    assert "no class for a value model of granite" in refused["no classifier"]
    assert all(part in refused["flipped"] for part in ("checksum", "decoder.layers.", "__0_0.distcp"))
    wrong = "parameters not filled once: decoder.layers.0.*HF tensors not used once: .*extra.weight"
    assert re.search(wrong, refused["maps"])
    assert found["nothing left"] == []


def test_a_checkpoint_cut_short_is_refused(found: dict[str, Any], work: Path) -> None:
    from mrlhf.checkpoint.source import open_source
    from mrlhf.errors import CheckpointError

    short = shutil.copytree(work / "llama.mrlhf", work / "short.mrlhf")
    os.truncate(short / "dist/__0_0.distcp", 1000)
    with pytest.raises(CheckpointError, match=r"dist/__0_0\.distcp has 1,000 bytes instead of"):
        open_source(str(short))


def test_dry_run_says_what_would_be_written(found: dict[str, Any]) -> None:
    text = "\n".join(found["dry run"])
    assert "phi3" in text and "tensors in 1 files" in text
    assert "head lm in float32" in text and "model.safetensors" in text
    assert "x" not in found["nothing left"]


def test_the_converter_writes_what_megatron_writes(found: dict[str, Any], work: Path) -> None:
    """Names, shapes, chunks and common state are those of Megatron's own save of the same model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    places = (work / "gemma3_text.mrlhf/dist", work / "megatrons_own/dist")
    ours, theirs = (dcp.FileSystemReader(place).read_metadata().state_dict_metadata for place in places)
    assert set(ours) == set(theirs)
    for name, entry in theirs.items():
        if isinstance(entry, TensorStorageMetadata):
            assert (ours[name].size, ours[name].properties.dtype) == (entry.size, entry.properties.dtype)
            assert sorted(map(str, ours[name].chunks)) == sorted(map(str, entry.chunks))
    with torch.serialization.safe_globals([Namespace]):  # Megatron-LM allows it too
        common, of_megatron = (torch.load(place / "common.pt") for place in places)
    assert {key: common[key] for key in of_megatron} == of_megatron and common["args"].num_layers == 2


def test_command_lines(zoo: Path, work: Path, found: dict[str, Any], tmp_path: Path) -> None:
    there = python(f"{TOOLS}/hf_to_megatron.py", "--hf", zoo / "qwen3", "--output", tmp_path / "q3", "--verify")
    assert "max |difference|" in there.stdout and there.stdout.rstrip().endswith("tolerance 0.0001: ok")
    back = python(
        f"{TOOLS}/megatron_to_hf.py",
        "--checkpoint",
        tmp_path / "q3",
        "--output",
        tmp_path / "hf",
        "--dtype",
        "bfloat16",
        "--verify",
    )
    assert back.stdout.rstrip().endswith("ok")
    wrong = python(f"{TOOLS}/verify.py", "--checkpoint", work / "qwen2.mrlhf", "--hf", work / "float32.hf", check=False)
    assert wrong.returncode == 1 and wrong.stdout.rstrip().endswith("FAILED")
    again = python(f"{TOOLS}/hf_to_megatron.py", "--hf", zoo / "qwen3", "--output", tmp_path / "q3", check=False)
    assert again.returncode == 2 and again.stderr.startswith(f"CheckpointError: {tmp_path / 'q3'}: the output exists")
    assert "Traceback" not in again.stderr


def test_inspection(zoo: Path, work: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from mrlhf.convert.inspect import list_contents

    lines = list_contents(str(work / "run"), tensors=True)
    text = "\n".join(lines)
    assert lines[0] == f"{work / 'run/checkpoints/step_5'}: mrlhf checkpoint" and "critic weights: 10 tensors" in text
    fc1 = ["decoder.layers.mlp.linear_fc1.weight", "2x384x128", "bfloat16", "192.0", "KiB"]
    assert any(line.split() == fc1 for line in lines), text
    hf = list_contents(str(zoo / "sharded"), tensors=True)
    assert any(line.split() == ["lm_head.weight", f"{VOCAB}x128", "float32", "161.5", "KiB"] for line in hf), hf
    assert len(list_contents(str(zoo / "sharded"), tensors=False)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba' is not supported"),
        ({"mlp_bias": True}, "missing: model.layers.0.mlp.down_proj.bias"),
        ({"attn_logit_softcapping": 30.0}, "not known for model_type = 'llama': attn_logit_softcapping = 30.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"num_hidden_layers": "four"}, "impossible value"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "'yarn'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"num_hidden_layers": 5}, "missing: model.layers.4."),
        ({"num_hidden_layers": 3}, "not known: model.layers.3."),
        ({"intermediate_size": 256}, "of another shape: model.layers.0.mlp.down_proj.weight"),
        ({"tie_word_embeddings": False, "architectures": ["LlamaForSequenceClassification"]}, "score.weight"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from mrlhf.checkpoint.source import open_source
    from mrlhf.errors import CheckpointError
    from mrlhf.models.hf_files import HFReader

    make_hf_model(tmp_path, "llama", vocab_size=64)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        source = open_source(str(tmp_path))
        HFReader(source.path, source.spec, head=source.head)


def test_the_verification_crosses_each_window() -> None:
    from mrlhf.convert.verify import _lengths
    from mrlhf.models.families import spec_from_hf

    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 8}
    small = {**sizes, "model_type": "mistral", "vocab_size": 512}
    assert _lengths(spec_from_hf(small))[-1] == 4104  # the window that transformers takes where config.json has none
    assert _lengths(spec_from_hf({**small, "sliding_window": None}))[-1] == 48
    assert _lengths(spec_from_hf({**small, "vocab_size": 1 << 18}))[-1] == 2048
