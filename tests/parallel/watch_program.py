"""A rank that is watched: no process group, only the store of the test.

usage: watch_program.py RANK WORLD PORT DIRECTORY

Rank 1 hangs in its second phase when it is told "hang", the others go on to their third.
"""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path

import torch.distributed as dist

from mrlhf.parallel.watch import Watch


def main() -> None:
    rank, world, port = map(int, sys.argv[1:4])
    store = dist.TCPStore(
        "127.0.0.1", port, None, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=20)
    )
    print("ready", flush=True)
    order = sys.stdin.readline().strip()
    watch = Watch(store, rank=rank, world=world, silence_s=2.0, behind_s=2.0, side="all")
    watch.directory = Path(sys.argv[4])
    watch.phase("first")
    watch.phase("second")
    while order == "hang" and rank == 1:
        time.sleep(0.1)
    watch.phase("third")
    print("third", flush=True)
    if sys.stdin.readline().strip() == "leave":
        watch.stop()
        print("left", flush=True)
        return
    time.sleep(60)


if __name__ == "__main__":
    main()
