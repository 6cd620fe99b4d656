"""Tells the kernels what to watch for at exits: which head to look through, and what stays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.fast.heads import CheapHead
from offramp.fast.layout import GATE, SIGNALS, WatchStruct
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

    def __post_init__(self) -> None:
        values = [value - _SLACK for _, value in self.bars.thresholds]
        self._values = (ctypes.c_float * len(values))(*values)
        self._index = {depth: i for i, (depth, _) in enumerate(self.bars.thresholds)}
        self._rows: tuple[int, ...] = ()
        self._first = 0
        self._struct = WatchStruct(signal=SIGNALS.get(self.bars.signal, GATE))
        if self.bars.gates is not None:
            self._gates, self._struct.signal = self.bars.gates.float().contiguous(), GATE
        if self.head is not None:
            self._struct.head = ctypes.pointer(self.head.head)
            if self.head.down is not None:
                self._struct.down = ctypes.pointer(self.head.down)

    def point(self, watch: Watch) -> WatchStruct:
        """Return what the kernels are to watch for; mostly it is the same as last time."""
        if watch.exits[0] != self._first:
            self._first = 0  # until it is true: Ctrl-C may come in between
            index = self._index[watch.exits[0]]
            self._struct.bars = ctypes.addressof(self._values) + 4 * index
            if self.head is None:
                self._struct.gates = self._gates[index].data_ptr()
            self._first = watch.exits[0]
        if watch.rows != self._rows:
            self._ask(watch.rows)
        return self._struct

    def _ask(self, rows: tuple[int, ...]) -> None:
        self._rows = ()
        width = 0 if self.head is None else self.head.head.outputs
        self.seen = torch.empty(len(rows), width)
        self._kept = (ctypes.c_int32 * len(rows))(*rows), (ctypes.c_float * len(rows))()
        asking, scores = self._kept
        self._struct.asking = ctypes.addressof(asking)
        self._struct.scores = ctypes.addressof(scores)
        self._struct.seen, self._struct.count = self.seen.data_ptr(), len(rows)
        self._rows = rows
