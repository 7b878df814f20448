"""Parked tensors take no device memory, come back bit for bit where they were, and everything that refers to them still
does.
"""

from __future__ import annotations

import pytest
import torch

from mrlhf.parallel.offload import Parking


def test_storages_leave_and_come_back() -> None:
    buffer, other = torch.randn(1000), torch.randn(3, 5).to(torch.bfloat16)
    view, part = buffer[:600].view(20, 30), torch.nn.Parameter(buffer[600:700])  # Megatron's parameters are such views
    wanted, address = buffer.clone(), id(view)
    parking = Parking()
    for round in range(2):
        assert parking.park([view, part.data, other, buffer]) == 4000 + 30  # a shared storage once
        assert parking.is_away and buffer.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        parking.fetch()
        assert not parking.is_away and torch.equal(buffer, wanted) and id(view) == address
        view.add_(1.0)
        wanted[:600] += 1.0
        assert torch.equal(buffer, wanted), f"the view no longer writes into the buffer, round {round}"
    parking.fetch()  # nothing is away
    assert torch.equal(part, wanted[600:700])


def test_gradients_are_dropped() -> None:
    grads, parking = torch.ones(64), Parking(keep=False)
    assert parking.park([grads[:32], grads[32:]]) == 256
    parking.fetch()
    assert torch.equal(grads, torch.zeros(64))


def test_nothing_to_park_and_parking_twice() -> None:
    parking = Parking()
    assert parking.park([]) == 0 and not parking.is_away
    parking.park([torch.ones(3)])
    with pytest.raises(AssertionError, match="parked already"):
        parking.park([torch.ones(3)])
