"""The state of every random generator of a process, as plain JSON: python, numpy, torch, and Megatron's on each device.

Row order, new weights and sampling have their own seeds, made from train.seed and the step. The states kept here serve
everything else that draws random numbers.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch

from mrlhf.parallel import device


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def capture() -> str:
    """The states of this rank's generators, as JSON."""
    from megatron.core import tensor_parallel

    name, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        "megatron": {k: _encode(v) for k, v in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }
    if device.current().is_cuda:
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return json.dumps(states)


def restore(text: str) -> None:
    """Sets the states that `capture` gave in a run of the same layout."""
    from megatron.core import tensor_parallel

    states = json.loads(text)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_decode(states["torch"]))
    tensor_parallel.get_cuda_rng_tracker().set_states({k: _decode(v) for k, v in states["megatron"].items()})
    if device.current().is_cuda and "cuda" in states:
        torch.cuda.set_rng_state(_decode(states["cuda"]))
