"""The state of every random generator of a process, as plain JSON: python, numpy, torch, and Megatron's on each device.

Orders, new weights and sampling have seeds of their own, made from train.seed and the step; what is kept here serves whatever else draws.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch

from mrlhf.parallel import device


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def capture() -> str:
    """JSON of the states of this rank."""
    from megatron.core import tensor_parallel

    name, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "megatron": {k: _text(v) for k, v in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }
    if device.current().is_cuda:
        found["cuda"] = _text(torch.cuda.get_rng_state())
    return json.dumps(found)


def restore(text: str) -> None:
    """What `capture` gave, in a process of the same layout."""
    from megatron.core import tensor_parallel

    found = json.loads(text)
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_tensor(found["torch"]))
    tensor_parallel.get_cuda_rng_tracker().set_states({k: _tensor(v) for k, v in found["megatron"].items()})
    if device.current().is_cuda and "cuda" in found:
        torch.cuda.set_rng_state(_tensor(found["cuda"]))
