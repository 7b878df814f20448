"""HF directories that others made: damaged, hostile, tied otherwise than they say. Each opens, or ends in an error."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mrlhf.checkpoint.source import open_source
from mrlhf.data.tokenizers.hf import stop_ids
from mrlhf.errors import CheckpointError, MrlhfError
from mrlhf.models.families import hf_tensors, spec_from_hf, vllm_config
from mrlhf.models.families.slices import TensorSlice
from mrlhf.models.families.spec import MAX_LAYERS
from mrlhf.models.hf_files import HEADERS, INDEX, SINGLE, HFReader, copy_side_files, plan_output

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 24, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": 64,
    "use_sliding_window": False, "sliding_window": 16, "hidden_act": "silu", "eos_token_id": 2,
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make(directory: Path, *, sharded: bool = False, tensors: dict[str, torch.Tensor] | None = None,
         **changes: object) -> Path:  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    generator = torch.Generator().manual_seed(1)
    wanted = hf_tensors(spec_from_hf(config), head="lm").items()
    values = {name: torch.randn(t.stored_shape, generator=generator) for name, t in wanted} | (tensors or {})
    if not sharded:
        save_file(values, directory / SINGLE)
        return directory
    names = sorted(values)
    places = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: values[n] for n in names if places[n] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return directory


def opened(directory: Path) -> HFReader:
    """All that a stage does with a directory before it builds a model."""
    source = open_source(str(directory))
    copy_side_files(source.hf_dir, directory.with_name(directory.name + ".copy"))
    stop_ids(source.hf_dir, type("Tokenizer", (), {"eos_token_id": 1}))
    return HFReader(source.path, source.spec, head=source.head)


def deep(n: int) -> str:
    return '{"a":' * n + "1" + "}" * n


TEXTS = ["", "null", "[]", "1", '"x"', "{", "NaN", deep(40), deep(500), deep(100_000), "[" * 10**6, '{"a": 1} 2',
         '{"a": "\ud800"}'.encode("utf-8", "surrogatepass"), b'{"a": "\xe9"}', b"\xff\xfe{}", b"\0" * 64,
         '{"weight_map": null}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../../x"}}',
         '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": ""}}',
         '{"eos_token_id": {"a": 1}}', '{"eos_token_id": [[1]]}', '{"model_type": ["qwen2"]}', '{"x": 1e999}',
         '{"x": ' + "9" * 5000 + "}"]  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX, "header"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_other_json_is_refused(tmp_path: Path, file: str, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    directory = make(tmp_path / "hf", sharded=file == INDEX)
    if file == "header":
        (directory / SINGLE).write_bytes(len(data).to_bytes(8, "little") + data)
    else:
        (directory / file).write_bytes(data)
    if file == "generation_config.json" and text in ('{"x": 1e999}', *(t for t in TEXTS if "weight_map" in str(t))):
        return  # other keys than the one that is read
    if file == "generation_config.json" and "model_type" in str(text):
        return
    with pytest.raises(MrlhfError) as caught:
        opened(directory)
    assert str(directory) in str(caught.value)


BAD = [None, "x", "4", True, [], {}, 0, -1, 1.5, float("nan"), float("inf"), 10**9, 10**30, "\ud800", [1], {"a": 1}]


@pytest.mark.parametrize("key", [*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "layer_types"])
def test_a_hostile_field_is_refused_or_changes_nothing(tmp_path: Path, key: str) -> None:
    sane = spec_from_hf(CONFIG)
    for value in BAD:
        try:
            spec = spec_from_hf({**CONFIG, key: value})
        except MrlhfError as error:
            assert len(str(error)) < 2000 and str(error).encode()
            continue
        fields = {k for k in vars(spec) if vars(spec)[k] != vars(sane)[k]}
        size = {"vocab_size", "max_position_embeddings", "norm_eps", "tied", "ropes", "head_dim", "ffn_hidden_size",
                "num_attention_heads", "hidden_size", "num_query_groups"}  # fmt: skip
        assert fields <= size, (key, value, fields)
        if value is None or isinstance(value, str | list | dict):
            assert not fields - {"head_dim", "num_query_groups"}, (key, value, fields)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3_text", {"sliding_window_pattern": 0}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
        ("qwen3_moe", {"num_experts": 10**7}),
        ("qwen3_moe", {"num_experts_per_tok": 999}),
        ("smollm3", {"no_rope_layer_interval": 0}),
        ("granite", {"logits_scaling": 0.0}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma2", {"query_pre_attn_scalar": -4}),
        ("gemma2", {"final_logit_softcapping": 0.0}),
        ("gemma2", {"attn_logit_softcapping": float("nan")}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"sliding_window": -5}),
        ("llama", {"num_hidden_layers": MAX_LAYERS + 1}),
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"num_labels": 10**12, "rope_theta": "x"}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"head_dim": 5}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "8"}}),
        ("llama", {"rope_scaling": {"rope_type": ["linear"], "factor": 8.0}}),
        ("llama", {"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}}),
        ("gpt2", {"num_hidden_layers": 10**9}),
        ("gpt2", {"n_layer": 10**9}),
    ],
)
def test_values_out_of_bounds_are_refused_at_once(family: str, changes: dict[str, Any]) -> None:
    sizes = {"vocab_size": 24, "hidden_size": 64, "intermediate_size": 12, "num_hidden_layers": 2,
             "num_attention_heads": 16, "num_key_value_heads": 16, "n_layer": 2, "n_embd": 64, "n_head": 16,
             "n_positions": 9}  # fmt: skip
    sizes = {k: v for k, v in sizes.items() if k.startswith("n_") == (family == "gpt2") or k == "vocab_size"}
    spec_from_hf({**sizes, "model_type": family})
    with pytest.raises(CheckpointError):
        spec_from_hf({**sizes, "model_type": family, **changes})


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-1.safetensors"])
def test_a_flipped_bit_is_an_error_or_the_same_model(tmp_path: Path, file: str) -> None:
    """Or one with other numbers, each in its bounds: config.json has no checksum."""
    directory, draw = make(tmp_path / "hf", sharded=True), random.Random(file)
    sane, whole = open_source(str(directory)).spec, (directory / file).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if file.endswith(".safetensors") else len(whole)
    refused = 0
    for _ in range(60):
        bit = draw.randrange(8 * header)
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (directory / file).write_bytes(flipped)
        try:
            opened(directory).close()
            spec = open_source(str(directory)).spec
        except MrlhfError:
            refused += 1
        else:
            changed = {k for k in vars(spec) if vars(spec)[k] != vars(sane)[k]}
            assert changed <= {"norm_eps", "ropes", "max_position_embeddings", "tied", "layers"}, changed
    assert refused > 20


@pytest.mark.parametrize("name", ["extra.json", "vocab.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"])
@pytest.mark.parametrize("how", ["absolute", "relative", "chain", "through a folder", "hub's blob"])
def test_no_link_leads_out_of_the_directory(tmp_path: Path, name: str, how: str) -> None:
    secret = tmp_path / "outside/secret"
    secret.parent.mkdir()
    secret.write_text("secret")
    hub = tmp_path / "models--a--b"
    directory = make(hub / "snapshots/1" if how == "hub's blob" else tmp_path / "hf")
    if how == "absolute":
        (directory / name).symlink_to(secret)
    elif how == "relative":
        (directory / name).symlink_to("../outside/secret")
    elif how == "chain":
        (directory / "data.bin").symlink_to(secret)
        (directory / name).symlink_to("data.bin")
    elif how == "through a folder":
        (directory / "folder").symlink_to(secret.parent)
        (directory / name).symlink_to("folder/secret")
    else:
        (hub / "blobs").mkdir()
        (hub / "blobs/1").symlink_to(secret)
        (directory / name).symlink_to("../../blobs/1")
    with pytest.raises(CheckpointError, match=f"{name}: a link out of the directory"):
        open_source(str(directory))
    with pytest.raises(CheckpointError, match="a link out of the directory"):
        copy_side_files(directory, tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()


def test_links_inside_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    hub = tmp_path / "models--a--b"
    directory = make(hub / "snapshots/1")
    (hub / "blobs").mkdir()
    for file in list(directory.iterdir()):
        file.rename(hub / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    (directory / "extra.json").symlink_to("config.json")
    os.mkfifo(directory / "pipe.json")
    (directory / "folder.json").mkdir()
    (directory / "nowhere.txt").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(directory)
    opened(tmp_path / "linked").close()
    assert sorted(f.name for f in (tmp_path / "linked.copy").iterdir()) == [
        "config.json", "extra.json", "generation_config.json", HEADERS
    ]  # fmt: skip
    with (directory / "huge.txt").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(CheckpointError, match=r"huge\.txt: 2,147,483,648 bytes"):
        open_source(str(directory))


def test_two_different_matrices_are_not_tied(tmp_path: Path) -> None:
    """transformers 5 keeps both; what is copied into a checkpoint says so, and vLLM is told."""
    from transformers import AutoModelForCausalLM

    head = torch.randn(24, 8)
    directory = make(tmp_path / "hf", tensors={HEAD: head})
    source = open_source(str(directory))
    assert not source.spec.tied and vllm_config(source.spec) == {"tie_word_embeddings": False}
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(theirs.lm_head.weight, head)
    assert torch.equal(opened(directory).read(TensorSlice(HEAD, 0, 0, 24, 0)), head)
    copied = json.loads((tmp_path / "hf.copy/config.json").read_text())
    assert copied == {**CONFIG, "tie_word_embeddings": False}
    files, _ = plan_output({n: (torch.float32, tuple(t.shape)) for n, t in load_file(directory / SINGLE).items()},
                           tmp_path / "hf.copy")  # fmt: skip
    assert (directory / SINGLE).read_bytes().startswith(files[0].header)


def test_equal_matrices_are_tied_and_one_under_either_name_is_enough(tmp_path: Path) -> None:
    directory = make(tmp_path / "hf")
    tensors = load_file(directory / SINGLE)
    plain = (directory / "config.json").read_bytes()
    make(directory, tensors={HEAD: tensors[EMBEDDING].clone()})
    assert opened(directory).tensors.keys() == tensors.keys() and open_source(str(directory)).spec.tied
    assert (tmp_path / "hf.copy/config.json").read_bytes() == plain
    swapped = {HEAD if name == EMBEDDING else name: t for name, t in tensors.items()}
    save_file(swapped, directory / SINGLE)
    value = opened(directory).read(TensorSlice(EMBEDDING, 0, 0, 24, 0))
    assert torch.equal(value, tensors[EMBEDDING])


@pytest.mark.parametrize(
    ("head", "message"),
    [(torch.zeros(25, 8), "of another shape"), (torch.zeros(24, 8, dtype=torch.int8), "of a type not read here")],
)
def test_a_head_that_cannot_be_compared_is_refused(tmp_path: Path, head: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source(str(make(tmp_path / "hf", tensors={HEAD: head})))


def test_untied_without_a_head_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path / "hf")
    for config in ({**CONFIG, "tie_word_embeddings": False}, {k: v for k, v in CONFIG.items() if k[:3] != "tie"}):
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
            opened(directory)
