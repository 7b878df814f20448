"""Checkpoints of Megatron-LM and of mrlhf are read by each other: the same logits, dense and with experts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TESTS, make_hf_model, python

from mrlhf.checkpoint.megatron_lm import TRACKER, add_names, find_tensors
from mrlhf.checkpoint.names import plain_name, second_names
from mrlhf.checkpoint.reader import DistReader
from mrlhf.checkpoint.tensor_archive import Item, build_index, save_tensor, write_metadata
from mrlhf.errors import CheckpointError

VOCAB = 300  # Megatron-LM pads it to 384, mrlhf to 320


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def found(work: Path, world: Path) -> dict[str, Any]:
    for kind, tied in (("qwen2", True), ("qwen3_moe", False)):
        make_hf_model(work / "hf" / kind, kind, vocab_size=VOCAB, tie_word_embeddings=tied)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(world / "qwen2" / name, work / "hf" / kind / name)
    args = (work, work / "hf/qwen2", work / "hf/qwen3_moe")
    done = python(TESTS / "checkpoint/stock_program.py", *args)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_each_reads_the_other(found: dict[str, Any], kind: str) -> None:
    """Theirs by their --save layout, with and without the number; ours by what their --load does, strictly."""
    result = found[kind]
    assert result["largest"] > 1
    for what in ("theirs read by us, stock", "theirs read by us, iter_0000007", "theirs exported to HF"):
        assert result[what] < 2e-5, what
    assert result["ours read by theirs"] == 0.0
    args = result["args"]
    assert (args["iteration"], args["version"]) == (3, 3.0)
    assert (args["num_layers"], args["num_query_groups"], args["padded_vocab_size"]) == (4, 2, 320)
    assert args["untie_embeddings_and_output_weights"] == (kind == "moe") and args["no_save_rng"]
    assert args.get("num_experts") == (4 if kind == "moe" else None)


def test_the_message_names_what_is_missing(found: dict[str, Any], work: Path, tmp_path: Path) -> None:
    message = found["dense"]["without config"]
    assert "without a HF config.json" in message and str(work / "dense/stock/hf") in message
    assert find_tensors(tmp_path) is None, "no checkpoint of Megatron-LM at all"
    (tmp_path / TRACKER).write_text("12\n")
    with pytest.raises(CheckpointError, match=r"no \.metadata in it") as error:
        find_tensors(tmp_path)
    assert error.value.where == str(tmp_path / "iter_0000012")
    (tmp_path / "iter_0000012/mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="format torch"):
        find_tensors(tmp_path)
    for text in ("../../etc", "-3", ""):
        (tmp_path / TRACKER).write_text(text)
        with pytest.raises(CheckpointError, match="is no iteration"):
            find_tensors(tmp_path)


def test_the_names_of_a_checkpoint_and_of_a_release(tmp_path: Path) -> None:
    for step, name in ((17, "iter_0000017"), (0, "release")):
        checkpoint = tmp_path / str(step)
        (checkpoint / "dist").mkdir(parents=True)
        (checkpoint / "dist/.metadata").write_bytes(b"")
        add_names(checkpoint, step=step)
        assert os.readlink(checkpoint / name) == "dist" and find_tensors(checkpoint) == checkpoint / name


def test_one_plain_name_for_all_names_of_a_tensor() -> None:
    layer, state = "decoder.layers.3", "optimizer.state.exp_avg.decoder.layers"
    same = {
        f"{layer}.self_attention.linear_qkv.layer_norm_weight": f"{layer}.input_layernorm.weight",
        f"{state}.mlp.linear_fc1.layer_norm_bias": f"{state}.pre_mlp_layernorm.bias",
        f"{layer}.self_attention.linear_q_up_proj.layer_norm_weight": f"{layer}.self_attention.q_layernorm.weight",
        f"{layer}.self_attention.linear_q_up_proj.weight": f"{layer}.self_attention.linear_q_up.weight",
        f"{layer}.self_attention.linear_q_proj.weight": f"{layer}.self_attention.linear_q_up.weight",
    }
    for name, plain in same.items():
        assert plain_name(name) == plain_name(plain) == plain
    own = {f"{layer}.mlp.linear_fc1.weight", f"{layer}.self_attention.linear_qkv.weight", "output_layer.weight"}
    assert {plain_name(name) for name in own} == own


def test_a_norm_that_megatrons_local_spec_names_otherwise_has_two_names() -> None:
    experts = {"decoder.layers.pre_mlp_layernorm.weight": 1, "decoder.layers.mlp.router.weight": 2}
    assert second_names(experts) == {"decoder.layers.mlp.linear_fc1.layer_norm_weight": next(iter(experts))}
    dense = [
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    ]
    assert second_names([*dense, "decoder.layers.self_attention.q_layernorm.weight"]) == {}
    kv = "decoder.layers.0.self_attention.linear_kv_up_proj."
    latent = [f"{kv}layer_norm_weight", f"{kv}weight", "decoder.layers.0.input_layernorm.weight"]
    assert second_names(latent) == {"decoder.layers.0.self_attention.kv_layernorm.weight": f"{kv}layer_norm_weight"}


def test_tensors_of_single_layers_and_of_all_layers_together(tmp_path: Path) -> None:
    """Newer Megatron-LM gives each layer's tensors a name of their own."""
    values = torch.arange(24.0).view(3, 2, 4)
    pieces = {
        "together": [("decoder.layers.a.weight", (0, 0, 0), (3, 2, 4), values)],
        "alone": [(f"decoder.layers.{i}.a.weight", (0, 0), (2, 4), values[i].clone()) for i in range(3)],
    }
    for form, tensors in pieces.items():
        (tmp_path / form).mkdir()
        items, end = [], 0
        with (tmp_path / form / "__0_0.distcp").open("w+b", buffering=0) as file:
            for key, offset, shape, value in tensors:
                length = save_tensor(value, file.fileno(), end)
                items.append(Item(key, offset, tuple(value.shape), shape, value.dtype, end, length))
                end += length
        write_metadata(tmp_path / form, build_index([("__0_0.distcp", items)]))
        reader = DistReader(tmp_path / form)
        stacked, single = torch.zeros(1, 2, 3), torch.zeros(1, 4)
        reader.read("decoder.layers.a.weight", (2, 0, 1), (3, 2, 4), stacked)
        reader.read("decoder.layers.1.a.weight", (1, 0), (2, 4), single)
        assert torch.equal(stacked[0], values[2, :, 1:]) and torch.equal(single[0], values[1, 1])
        with pytest.raises(CheckpointError, match="instead of"):
            reader.read("decoder.layers.1.a.weight", (1, 0), (2, 5), single)
        with pytest.raises(CheckpointError, match="no such tensor"):
            reader.read("decoder.layers.1.b.weight", (1, 0), (2, 4), single)
        reader.close()


def test_padded_rows(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(6, 2)
    with (tmp_path / "__0_0.distcp").open("w+b", buffering=0) as file:
        item = Item("v", (0, 0), (6, 2), (6, 2), value.dtype, 0, save_tensor(value, file.fileno(), 0))
    write_metadata(tmp_path, build_index([("__0_0.distcp", [item])]))
    reader, out = DistReader(tmp_path), torch.full((4, 2), 9.0)
    reader.read("v", (4, 0), (8, 2), out, padded=True)
    assert torch.equal(out, torch.cat([value[4:], torch.zeros(2, 2)]))
    with pytest.raises(CheckpointError, match="instead of"):
        reader.read("v", (4, 0), (8, 2), out)
    reader.close()
