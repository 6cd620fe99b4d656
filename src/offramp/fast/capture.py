"""Captures functions of fixed shape as CUDA graphs; elsewhere it calls them. Knows no models.

**The CUDA branch has not been run on a GPU yet.**
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_GRAPHS = 256
"""Most graphs kept; the one unused for longest makes room."""


class Graphs:
    """Functions of tensors that never move: captured at the first call on CUDA, then replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[Hashable, Callable[[], Tensor]] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Return what ``function`` makes now; a later call of the same key replays the first one.

        The result is overwritten by the next call of any key.
        """
        replay = self._kept.pop(key, None)
        if replay is None:
            replay = self._captured(function)  # which waits for all that runs
        self._kept[key] = replay  # the last is the youngest
        if len(self._kept) > _GRAPHS:
            del self._kept[next(iter(self._kept))]
        return replay()

    def clear(self) -> None:
        """Forget all: something they refer to has moved."""
        if self._device.type == "cuda" and self._kept:
            torch.cuda.synchronize(self._device)  # none may run any more
        self._kept.clear()
        self._pool = None  # a pool is gone with its last graph

    def _captured(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self._device.type != "cuda":
            return function
        with torch.cuda.device(self._device):  # not run yet
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose kernels and make room at first calls
                function()
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
