"""A store without the keys of an earlier attempt.

torchrun gives the ranks that it restarts (--max-restarts) the store of the attempt before, with every key still in it.
gloo then reads where rank 0 listened before it died: "Connection refused", until all restarts are used up (torch 2.13;
NCCL uses the same store). Attempt numbers do not help, because hosts count them differently. So the ranks agree on a
new name: rank 0 draws it and publishes it together with what each rank has drawn, which proves to that rank that the
name is of this attempt.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid

import torch.distributed as dist

_POLL_S = 0.02
_HELLO, _NAME, _SEEN = "mrlhf/hello", "mrlhf/name", "mrlhf/seen"


def fresh_store(store: dist.Store, *, rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """Collective. `store` under a prefix of this attempt. Raises TimeoutError if a rank does not arrive in time."""
    if world == 1:
        return store
    end = time.monotonic() + timeout.total_seconds()
    mine = uuid.uuid4().hex

    def wait() -> None:
        if time.monotonic() > end:
            raise TimeoutError(f"not all of the {world} ranks came within {timeout}")
        time.sleep(_POLL_S)

    if rank != 0:
        store.set(f"{_HELLO}/{rank}", mine)
        while True:
            published = json.loads(store.get(_NAME)) if store.check([_NAME]) else {}
            if published.get("of", {}).get(str(rank)) == mine:
                break
            wait()
        store.set(f"{_SEEN}/{published['name']}/{rank}", "")
        return dist.PrefixStore(published["name"], store)
    others = range(1, world)
    known: dict[int, str] = {}
    while not all(store.check([f"{_SEEN}/{mine}/{r}"]) for r in others):
        hellos = {r: store.get(f"{_HELLO}/{r}").decode() for r in others if store.check([f"{_HELLO}/{r}"])}
        if hellos != known:
            known = hellos
            store.set(_NAME, json.dumps({"name": mine, "of": known}))
        wait()
    return dist.PrefixStore(mine, store)
