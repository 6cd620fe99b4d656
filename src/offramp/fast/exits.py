"""Tells the kernels what to watch for at exits: which head to look through, and what stays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.fast.heads import CheapHead
from offramp.fast.layout import GATE, SIGNALS, RowsStruct, WatchStruct
from offramp.watch import Bars, Watch

_SLACK = 1e-3
"""By how much the kernels' score may differ from the policy's: what is nearer is asked."""


def known(bars: Bars) -> bool:
    """Return whether the kernels can tell who stays."""
    return bars.gates is not None or bars.signal in SIGNALS


@dataclass(eq=False)
class Screen:
    """One policy seen through one head, and what must stay in memory for the kernels."""

    bars: Bars
    head: CheapHead | None
    """None: gates look at the state itself."""
    seen: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[S, W]``: where the kernels leave the logits of the last exit they looked at."""
    made: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[N, D]``: where they run the block of an exit, the S rows that ask first."""

    def __post_init__(self) -> None:
        values = [value - _SLACK for _, value in self.bars.thresholds]
        self._values = (ctypes.c_float * len(values))(*values)
        self._index = {depth: i for i, (depth, _) in enumerate(self.bars.thresholds)}
        self._rows: tuple[tuple[int, ...], torch.Size] | None = None
        self._first = 0
        self._blocks: tuple[int | None, ...] = ()
        self._struct = WatchStruct(signal=SIGNALS.get(self.bars.signal, GATE))
        if self.bars.gates is not None:
            self._gates, self._struct.signal = self.bars.gates.float().contiguous(), GATE
        if self.head is not None:
            self._struct.head = ctypes.pointer(self.head.head)
            if self.head.down is not None:
                self._struct.down = ctypes.pointer(self.head.down)
            if self.head.exact is not None:
                self._struct.exact = ctypes.pointer(self.head.exact)

    def point(self, watch: Watch, shape: torch.Size) -> WatchStruct:
        """Return what the kernels are to watch for among so many rows ``[N, D]``.

        Mostly it is the same as last time.
        """
        if watch.exits[0] != self._first:
            self._first = 0  # until it is true: Ctrl-C may come in between
            index = self._index[watch.exits[0]]
            self._struct.bars = ctypes.addressof(self._values) + 4 * index
            if self.head is None:
                self._struct.gates = self._gates[index].data_ptr()
            self._first = watch.exits[0]
        if tuple(watch.blocks) != self._blocks:
            self._owned(tuple(watch.blocks))
        if (watch.rows, shape) != self._rows:
            self._ask(watch.rows, shape)
        return self._struct

    def _owned(self, blocks: tuple[int | None, ...]) -> None:
        self._blocks = ()
        layers = [-1 if layer is None else layer for layer in blocks]
        self._layers = (ctypes.c_int32 * len(layers))(*layers)
        self._struct.blocks = ctypes.addressof(self._layers)
        self._blocks = blocks

    def _ask(self, rows: tuple[int, ...], shape: torch.Size) -> None:
        self._rows = None
        width = 0 if self.head is None else self.head.head.outputs
        self.seen, self.made = torch.empty(len(rows), width), torch.empty(shape)
        order = [*rows, *sorted({*range(shape[0])} - {*rows})]
        self._order = (ctypes.c_int32 * len(order))(*order)
        self._scores = (ctypes.c_float * len(rows))()
        self._struct.order = ctypes.addressof(self._order)
        self._struct.scores = ctypes.addressof(self._scores)
        self._struct.seen, self._struct.made = self.seen.data_ptr(), self.made.data_ptr()
        self._struct.asks = ctypes.pointer(RowsStruct(count=len(rows)))
        self._rows = rows, shape
