"""On CUDA no layer makes a tensor of a row's length squared, and none waits for the device but experts, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TESTS, python

from cuda.attention_cases import CASES, LAYOUTS

# once a step or a micro-batch: the head's kept tokens, the gradient norm, metrics
OF_THE_STEP = ("mrlhf/models/layers/logprobs.py:", "megatron/core/distributed/", "megatron/core/optimizer/",
               "megatron/core/utils.py:", "mrlhf/training/", "mrlhf/parallel/state.py:",
               "mrlhf/models/layers/router_losses.py:_summed")  # fmt: skip
DISPATCH = "megatron/core/transformer/moe/token_dispatcher.py:_maybe_dtoh_and_synchronize"


@pytest.fixture(scope="module")
def rehearsed(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("attention") / "result.json"
    python(TESTS / "cuda/attention_program.py", zoo, out, device="rehearsal", timeout=600)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_is_square_in_the_row_length(rehearsed: dict[str, dict], name: str) -> None:
    assert rehearsed[name]["squares"] == {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_no_layer_waits_for_the_device(rehearsed: dict[str, dict], name: str, layout: str) -> None:
    waits = rehearsed[name]["waits"][layout]
    of_layers = {place: n for place, n in waits.items() if not place.startswith(OF_THE_STEP)}
    # how many tokens each expert gets is known to the device alone: one copy a layer, of two layers
    assert of_layers == ({DISPATCH: 2} if "experts" in name else {})


def test_the_load_balance_waits_twice_a_step(rehearsed: dict[str, dict]) -> None:
    """For the counts before the step and for the losses after it, not in each layer."""
    for layout in LAYOUTS:
        assert rehearsed["experts"]["waits"][layout]["mrlhf/models/layers/router_losses.py:_summed"] == 2
