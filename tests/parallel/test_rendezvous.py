"""Ranks that start again on the store of a dead attempt meet, and do not read its keys."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mrlhf.parallel.rendezvous import fresh_store

LIMIT = datetime.timedelta(seconds=20)


def test_every_attempt_has_its_own_keys() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        for attempt in range(3):
            # the last one to come is another rank each time; one attempt dies half way: rank 2 alone has said hello
            if attempt == 1:
                with pytest.raises(TimeoutError, match="not all of the 3 ranks"):
                    fresh_store(store, rank=2, world=3, timeout=datetime.timedelta(seconds=0.1))
            order = [(rank + attempt) % 3 for rank in range(3)]
            found = [
                f.result() for f in [pool.submit(fresh_store, store, rank=r, world=3, timeout=LIMIT) for r in order]
            ]
            assert not found[0].check(["address"]), "a key of the attempt before"
            found[0].set("address", str(attempt))
            assert {f.get("address") for f in found} == {str(attempt).encode()}


def test_one_rank_needs_nobody() -> None:
    store = dist.HashStore()
    assert fresh_store(store, rank=0, world=1, timeout=LIMIT) is store
