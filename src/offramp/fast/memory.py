"""Memory for what is read from end to end at every token: in huge pages where the system has them.

A step reads every weight once. Over small pages a processor's prefetcher stops every 4 KiB and
looks up a new address; over pages of 2 MiB it goes on (docs/log.md has the measurement).
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_REGION = 32 * 2**20
_HUGE = 2 * 2**20
_LINE = 64


class Arena:
    """Hands out pieces of a few large regions; they live as long as a tensor refers to them."""

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor``, contiguous and at the start of a cache line."""
        size = tensor.numel() * tensor.element_size()
        if self._used + size > len(self._region):
            self._region, self._used = zeros((max(size, _REGION),), torch.uint8), 0
        piece = self._region[self._used : self._used + size]
        self._used += -(-size // _LINE) * _LINE
        copy = piece.view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros, at the start of a huge page if they fill one.

    Raises:
        MemoryError: there is no room.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE:
        return torch.zeros(shape, dtype=dtype)
    try:
        # Private, for shared memory gets no huge pages. The tensor keeps it alive.
        pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size >> 20} MiB") from error
    with suppress(OSError, AttributeError):  # advice only, which not every system takes
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size].view(dtype).view(shape)
