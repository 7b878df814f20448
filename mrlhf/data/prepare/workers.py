"""Blocks -> shards, in worker processes. Heads come back in the order of the blocks, whatever the number of workers."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from mrlhf.data.prepare.shards import WorkDirectory, read_head, write_shard
from mrlhf.data.prepare.sources import RowBlock
from mrlhf.data.prepare.tokenise import Batch, Tokenise
from mrlhf.errors import EnvironmentProblem


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Work:
    """Turns blocks into shards; `dtype` of the token ids."""

    tokenise: Tokenise
    directory: WorkDirectory
    dtype: np.dtype

    def __call__(self, number: int, block: RowBlock) -> dict[str, Any]:
        """The head of the block's shard, which is written unless it is there already (after an interruption)."""
        content = block.content()
        digest = hashlib.sha256(b"%d\n" % block.skipped + content).hexdigest()
        path = self.directory.shard(number)
        if self.directory.resume:
            head = read_head(path)
            if head is not None and head["digest"] == digest:
                return head
        batch = Batch()
        for chunk in block.chunks(content):
            self.tokenise(chunk, batch)
        head = {
            "digest": digest,
            "source": block.source,
            "path": block.path,
            "lines": block.count(content),
            "rows": batch.rows,
            "kept": batch.kept,
            "truncated": batch.truncated,
            "drops": batch.drops,
            "problems": [asdict(problem) for problem in batch.problems],
            "problem_counts": batch.problem_counts,
            "with_margin": sum(margin is not None for margin in batch.margins),
        }
        write_shard(path, head, batch, self.dtype)
        return head


_work: Work


def _start(work: Work, parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent ends this one
    gc.freeze()  # imported objects stay for good: collections skip them, and forked pages stay shared

    # a killed parent closes no queue that its other children hold open, so they would wait for ever
    def exit_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run(number: int, block: RowBlock) -> dict[str, Any]:
    return _work(number, block)


def run_workers(work: Work, blocks: Iterator[RowBlock], *, workers: int) -> Iterator[dict[str, Any]]:
    """The head of every block's shard; two blocks more than workers in flight, so that memory stays bounded.

    Raises EnvironmentProblem where a worker dies.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; also silences the warning about forking
    first = [block for block in (next(blocks, None), next(blocks, None)) if block is not None]
    numbered = enumerate(chain(first, blocks))
    if workers == 1 or len(first) < 2:
        for number, block in numbered:
            yield work(number, block)
        return
    # fork shares the loaded tokenizer; elsewhere it is pickled once a worker
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending: deque[Future[dict[str, Any]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work, os.getpid()))
    try:
        for number, block in numbered:
            pending.append(pool.submit(_run, number, block))
            if len(pending) >= workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem("a worker process died, most likely for want of memory",
                                 fix=f"--workers {max(1, workers // 2)} --resume") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
