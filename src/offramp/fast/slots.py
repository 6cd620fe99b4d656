"""Keys and values of one text, for all layers, in buffers that double. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16


@dataclass(frozen=True)
class Sizes:
    """How large the keys and values of one position are."""

    layers: int
    heads: int
    size: int

    @property
    def padded(self) -> int:
        """Return the floats that a value takes."""
        return -(-self.size // LANES) * LANES


class Slot:
    """Buffers ``keys [L, H, capacity / 16, size, 16]`` and ``values [L, H, capacity, padded]``.

    Sixteen keys lie side by side, so that one vector holds the same coordinate of sixteen keys.
    ``lengths`` says how many positions each layer holds; trimming is a change of it.
    """

    __slots__ = ("capacity", "keys", "lengths", "sizes", "values")

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.lengths = [0] * sizes.layers
        self.capacity = 0
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    def reserve(self, positions: int) -> None:
        """Make room for this many positions."""
        if positions <= self.capacity:
            return
        s, blocks = self.sizes, self.capacity // LANES
        room = max(64, 2 * (-(-positions // LANES) * LANES))
        keys = torch.empty(s.layers, s.heads, room // LANES, s.size, LANES)
        values = torch.empty(s.layers, s.heads, room, s.padded)
        if blocks:
            keys[:, :, :blocks] = self.keys
            values[:, :, : self.capacity] = self.values
        self.keys, self.values, self.capacity = keys, values, room

    def trim(self, length: int, first_layer: int) -> None:
        """Forget positions from ``length`` on in every layer from ``first_layer`` on."""
        for layer in range(first_layer, self.sizes.layers):
            self.lengths[layer] = min(self.lengths[layer], length)

    def clear(self) -> None:
        """Free the buffers."""
        self.__init__(self.sizes)  # type: ignore[misc]

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, ``[H, length, size]`` each."""
        length, s = self.lengths[layer], self.sizes
        keys = self.keys[layer].transpose(-1, -2).reshape(s.heads, self.capacity, s.size)
        return keys[:, :length], self.values[layer, :, :length, : s.size]
