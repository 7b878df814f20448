"""Tensors that move to the host while the device does not need them, storage by storage.

Parameters, views into Megatron's buffers and optimizer states keep referring to the same storages: a storage shrinks to
0 bytes and later gets its contents back. On CUDA host memory is pinned, all copies of a call overlap on a stream of
their own, and `fetch` returns before they are done: the current stream waits for them on the device. On CPU the same
steps use ordinary memory, which saves nothing but gives the results of a GPU run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Parking:
    """A set of tensors that move together. keep: false if their contents are not needed again (gradients)."""

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._away: list[tuple[torch.UntypedStorage, int]] = []
        self._host: dict[int, torch.Tensor] = {}  # by storage; allocating pinned memory is slow, so it is kept
        self._stream: torch.cuda.Stream | None = None

    @property
    def is_away(self) -> bool:
        return bool(self._away)

    def _side(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream

    @torch.no_grad()
    def park(self, tensors: Iterable[torch.Tensor]) -> int:
        """Moves the tensors to the host and returns the bytes freed. Nothing may use them until `fetch`."""
        assert not self._away, "parked already"
        storages = {s._cdata: s for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
        if not storages:
            return 0
        side = self._side(next(iter(storages.values())).device)
        with _on(side):
            for key, storage in storages.items() if self.keep else ():
                if key not in self._host or self._host[key].numel() != storage.nbytes():
                    self._host[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=side is not None)
                self._host[key].copy_(_bytes_of(storage), non_blocking=True)
        if side is not None:
            side.synchronize()
        self._away = [(s, s.nbytes()) for s in storages.values()]
        for storage, _ in self._away:
            storage.resize_(0)
        return sum(size for _, size in self._away)

    @torch.no_grad()
    def fetch(self) -> None:
        """Brings all tensors back, or zeros without `keep`. Does nothing if none is away."""
        if not self._away:
            return
        for storage, size in self._away:
            storage.resize_(size)
        side = self._side(self._away[0][0].device)
        with _on(side):
            for storage, _ in self._away:
                if self.keep:
                    _bytes_of(storage).copy_(self._host[storage._cdata], non_blocking=True)
                else:
                    _bytes_of(storage).zero_()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        self._away = []
