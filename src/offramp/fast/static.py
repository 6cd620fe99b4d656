"""Keys and values of all texts in one buffer per layer, whose addresses a graph may keep."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

LEAST = 64
"""Fewest positions reserved, and fewest keys attention looks at."""
_SLOTS = 4


class Store:
    """Buffers ``[slots, H, capacity, size]`` that double; slot 0 is nobody's: padding goes there.

    ``version`` changes whenever a buffer moves: whatever kept its address must be made again.
    """

    def __init__(
        self, layers: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.version = 0
        self.slots, self.capacity = _SLOTS, LEAST
        self._layers = layers
        self._free = list(reversed(range(1, self.slots)))
        self.keys, self.values = (
            [
                torch.zeros(self.slots, heads, self.capacity, size, dtype=dtype, device=device)
                for _ in range(layers)
            ]
            for _ in range(2)
        )

    def open(self) -> StaticSlot:
        """Return an empty slot; it is free again when closed, or when nothing refers to it."""
        if not self._free:
            before = self.slots
            self._grow(2 * before, self.capacity)
            # Taken from the end: low numbers first.
            self._free += reversed(range(before, self.slots))
        index = self._free.pop()
        for buffer in (*self.keys, *self.values):
            buffer[index].zero_()  # a masked key still counts if it is no number
        return StaticSlot(self, index, self._layers)

    def release(self, index: int) -> None:
        """Let another text have this slot."""
        self._free.append(index)

    def reserve(self, positions: int) -> None:
        """Make room for texts of this many positions."""
        if positions > self.capacity:
            self._grow(self.slots, at_least(positions))

    def _grow(self, slots: int, capacity: int) -> None:
        """Move everything, layer by layer, so that little is held twice.

        Memory that runs out on the way leaves some layers with larger buffers than needed.
        """
        self.version += 1
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                grown = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                kept = (min(slots, len(old)), min(capacity, old.shape[2]))
                grown[: kept[0], :, : kept[1]] = old[: kept[0], :, : kept[1]]
                buffers[layer] = grown
        self.slots, self.capacity = slots, capacity


class StaticSlot:
    """One text's place in a store; ``lengths`` says how many positions each layer holds."""

    __slots__ = ("__weakref__", "_store", "close", "index", "lengths")

    def __init__(self, store: Store, index: int, layers: int) -> None:
        self.index = index
        self.lengths = [0] * layers
        self._store = store
        self.close = weakref.finalize(self, store.release, index)
        """Give the slot back; the second time nothing happens."""
        self.close.atexit = False

    def trim(self, length: int, first_layer: int) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        for layer in range(first_layer, len(self.lengths)):
            self.lengths[layer] = min(self.lengths[layer], length)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, ``[H, length, size]`` each."""
        length, store = self.lengths[layer], self._store
        keys, values = store.keys[layer][self.index], store.values[layer][self.index]
        return keys[:, :length], values[:, :length]


def at_least(positions: int) -> int:
    """Return the power of two, from :data:`LEAST` on, that holds this many positions."""
    return max(LEAST, 1 << (positions - 1).bit_length())
