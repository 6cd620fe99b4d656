"""Tells the kernels what to watch for at exits: which head to look through, and what stays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.fast.heads import CheapHead
from offramp.fast.layout import GATE, SIGNALS, WatchStruct
from offramp.watch import Bars

_SLACK = 1e-3
"""By how much the kernels' score may differ from the policy's: what is nearer is asked."""


def known(bars: Bars) -> bool:
    """Return whether the kernels can tell who stays."""
    return bars.gates is not None or bars.signal in SIGNALS


@dataclass(eq=False)
class Screen:
    """One policy seen through one head, and what must stay in memory for the kernels."""

    bars: Bars
    head: CheapHead
    struct: WatchStruct = field(default_factory=WatchStruct)
    seen: Tensor = field(default_factory=lambda: torch.empty(0))
    """``[S, W]``: where the kernels leave the logits of the last exit they looked at."""
    _rows: tuple[int, ...] = ()
    _kept: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        self._index = {depth: i for i, (depth, _) in enumerate(self.bars.thresholds)}
        values = [value - _SLACK for _, value in self.bars.thresholds]
        self._values = (ctypes.c_float * len(values))(*values)
        if self.bars.gates is not None:
            self._gates, self.struct.signal = self.bars.gates.float().contiguous(), GATE
            return
        self.struct.signal = SIGNALS[self.bars.signal]
        self.struct.head = ctypes.pointer(self.head.head)
        if self.head.down is not None:
            self.struct.down = ctypes.pointer(self.head.down)

    @property
    def reads(self) -> bool:
        """Whether an exit reads out the rows."""
        return self.bars.gates is None

    def point(self, rows: tuple[int, ...], exits: Sequence[int]) -> WatchStruct:
        """Return what the kernels are to watch for: these rows, at these exits."""
        first = self._index[exits[0]]
        self.struct.bars = ctypes.addressof(self._values) + 4 * first
        if not self.reads:
            self.struct.gates = self._gates[first].data_ptr()
        if rows != self._rows:
            self._ask(rows)
        return self.struct

    def _ask(self, rows: tuple[int, ...]) -> None:
        asking, scores = (ctypes.c_int32 * len(rows))(*rows), (ctypes.c_float * len(rows))()
        self.seen = torch.empty(len(rows), self.head.head.outputs if self.reads else 0)
        self._rows, self._kept = rows, (asking, scores)
        self.struct.asking = ctypes.addressof(asking)
        self.struct.scores = ctypes.addressof(scores)
        self.struct.seen, self.struct.count = self.seen.data_ptr(), len(rows)
