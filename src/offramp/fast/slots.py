"""Keys and values of one text, for all layers, in buffers that double. Knows no models."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.fast.layout import TextStruct
from offramp.fast.memory import zeros

LANES, GROUP = 16, 32


@dataclass(frozen=True)
class Sizes:
    """How large the keys and values of one position are."""

    layers: int
    heads: int
    size: int
    int8: bool
    """Whether they are held as bytes with steps, or in fp32."""

    @property
    def padded(self) -> int:
        """Return the head size, rounded up to whole groups."""
        return -(-self.size // GROUP) * GROUP


class Slot:
    """Buffers ``[L, H, ...]`` in the layouts that kernels.cpp describes at ``struct Text``.

    Sixteen keys lie side by side, so that one vector holds the same coordinates of sixteen keys;
    as bytes, a key has a step per 32 coordinates and a value one step.
    ``lengths`` says how many positions each layer holds; trimming is a change of it.
    """

    __slots__ = (
        *("address", "capacity", "key_steps", "keys", "lengths", "sizes", "struct"),
        *("value_steps", "values"),
    )

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.lengths = [0] * sizes.layers
        self.capacity = 0
        self.keys = self.values = self.key_steps = self.value_steps = torch.empty(0)
        self.struct = TextStruct()
        self.address = ctypes.addressof(self.struct)
        """Where the kernels find the buffers."""

    def reserve(self, positions: int) -> None:
        """Make room for this many positions."""
        if positions <= self.capacity:
            return
        s, room = self.sizes, max(64, 2 * (-(-positions // LANES) * LANES))
        before, blocks = (s.layers, s.heads), room // LANES
        fours = (s.padded, 4) if s.int8 else (4, s.padded)
        # All are made before one is kept: memory that runs out leaves the slot as it was.
        grown = [
            _grown(self.keys, (*before, blocks, s.padded, LANES), int8=s.int8),
            _grown(self.values, (*before, room // 4, *fours), int8=s.int8),
        ]
        if s.int8:
            grown += [
                _grown(self.key_steps, (*before, blocks, s.padded // GROUP, LANES)),
                _grown(self.value_steps, (*before, room)),
            ]
        self.keys, self.values = grown[:2]
        self.key_steps, self.value_steps = grown[2:] or (self.key_steps, self.value_steps)
        self.capacity = room
        places = (self.keys, self.values, self.key_steps, self.value_steps)
        for name, buffer in zip(
            ("keys", "values", "key_steps", "value_steps"), places, strict=True
        ):
            setattr(self.struct, name, buffer.data_ptr())
        self.struct.capacity = room

    def hold(self, layers: Sequence[int], length: int) -> bool:
        """Return whether each of these layers, ascending, holds so many positions."""
        return all(
            self.lengths[run] == [length] * (run.stop - run.start) for run in _stretches(layers)
        )

    def extend(self, layers: Sequence[int], length: int) -> None:
        """Note that these layers, ascending, now hold so many positions."""
        for run in _stretches(layers):
            self.lengths[run] = [length] * (run.stop - run.start)

    def trim(self, length: int, layers: Iterable[int]) -> None:
        """Forget positions from ``length`` on in these layers."""
        for layer in layers:
            self.lengths[layer] = min(self.lengths[layer], length)

    def clear(self) -> None:
        """Free the buffers."""
        self.__init__(self.sizes)  # type: ignore[misc]

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, ``[H, length, size]`` each, in fp32."""
        length, s = self.lengths[layer], self.sizes
        shape = (s.heads, self.capacity, s.padded)
        if s.int8:  # [H, blocks, padded / 4, 16, 4] and [H, fours, padded, 4]
            keys = self.keys[layer].view(s.heads, -1, s.padded // 4, LANES, 4)
            steps = self.key_steps[layer].transpose(-1, -2).repeat_interleave(GROUP, -1)
            keys = keys.transpose(2, 3).reshape(shape).float() - 128
            keys = keys * steps.reshape(shape)
            values = self.values[layer].view(torch.int8).transpose(-1, -2).reshape(shape).float()
            values = values * self.value_steps[layer, :, :, None]
        else:
            keys = self.keys[layer].transpose(-1, -2).reshape(shape)
            values = self.values[layer].reshape(shape)
        return keys[:, :length, : s.size], values[:, :length, : s.size]


def _stretches(layers: Sequence[int]) -> list[slice]:
    """Return ascending layers as slices: one, as nearly always, or one each."""
    if layers and layers[-1] - layers[0] == len(layers) - 1:
        return [slice(layers[0], layers[-1] + 1)]
    return [slice(layer, layer + 1) for layer in layers]


def _grown(old: Tensor, shape: tuple[int, ...], *, int8: bool = False) -> Tensor:
    """Return a buffer of this shape that begins, along its third dimension, like ``old``.

    It is zeroed: the kernels read whole groups, and a step that is no number would spread.
    """
    grown = zeros(shape, torch.uint8 if int8 else torch.float32)
    if old.numel():
        grown[:, :, : old.shape[2]] = old
    return grown
