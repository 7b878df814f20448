"""Weights of which vLLM makes a form of its own: what it answers is what a fresh vLLM of the same form answers."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import TESTS, make_hf_model, python

from mrlhf.models.families import spec_from_hf
from mrlhf.rl.rollout.vllm_weights import check_weights


def test_fp8_made_anew_equals_a_fresh_start(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        make_hf_model(tmp_path / name, "qwen2", vocab_size=323, seed=seed)
    python(
        TESTS / "rl/rollout/weights_program.py",
        tmp_path / "result.json",
        tmp_path / "a",
        tmp_path / "b",
        ranks=2,
        vllm=True,
    )
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["answers"][1] == found["fresh"], "tokens and log-probs, bit for bit"
    assert found["answers"][0] != found["answers"][1]
    assert not found["moved"], "vLLM's kernels read the same memory after an update"
    assert found["made"] == 4 * 4, "the four linear layers of each of four layers"
    assert found["rounds"] > 1 and found["largest"] <= found["bucket"]
    assert found["received"] > 0
    assert found["sampler_differences"] == 0


def test_what_cannot_be_is_said_before(tmp_path: Path) -> None:
    make_hf_model(tmp_path, "qwen3_moe", vocab_size=323, num_hidden_layers=1)
    spec = spec_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert [str(e).split(":")[1] for e in check_weights(spec, "fp8", dtype="float32")] == [
        " rollout.weights = fp8",
        " rollout.weights = fp8",
    ]
    assert check_weights(spec, "packed", dtype="float32") == check_weights(spec, "plain", dtype="bfloat16") == []
