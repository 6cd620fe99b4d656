"""Keys and values per text and layer, shown to a Hugging Face model as the cache it expects.

Each text keeps its own buffers, so every layer may be filled to another length and trimming is
a change of a number. A model sees several texts as an ordinary left-padded batch: real keys end at
the right edge, so distances between keys are distances between positions, whatever the mask does
with them (sliding windows, ALiBi).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class FilledError(Exception):
    """Raised out of a layer once its keys and values are stored: nothing else of it is wanted."""


class LayerStore:
    """Keys and values of one text in one layer: buffers ``[H, capacity, d]`` that double."""

    __slots__ = ("keys", "length", "values")

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add ``[H, m, d]`` each."""
        end = self.length + keys.shape[-2]
        self.keys = _grown(self.keys, self.length, end, keys)
        self.values = _grown(self.values, self.length, end, values)
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end

    def view(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, ``[H, length, d]`` each."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, : self.length], self.values[:, : self.length]


def _grown(buffer: Tensor | None, length: int, end: int, like: Tensor) -> Tensor:
    if buffer is not None and end <= buffer.shape[-2]:
        return buffer
    grown = like.new_empty(like.shape[0], max(64, 2 * end), like.shape[-1])
    if buffer is not None:
        grown[:, :length] = buffer[:, :length]
    return grown


Slot = list[LayerStore]
"""One text's stores, layer by layer."""


class GroupLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache for a group of texts that each bring the same number of new rows."""

    is_sliding = False

    def __init__(self, stores: Sequence[LayerStore], starts: Sequence[int], rows: int) -> None:
        super().__init__()
        self.stores, self.starts = stores, starts
        self.past = max(starts)
        self.width = self.past + rows
        self.only_fill = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the stores make their buffers when first written."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store ``[B, H, m, d]`` and return all keys and values, left-padded, ``[B, H, width, d]``.

        Raises:
            FilledError: the layer was called for its keys and values only.
        """
        for store, start, keys, values in zip(
            self.stores, self.starts, key_states, value_states, strict=True
        ):
            assert store.length == start, "a layer was run out of turn"
            store.append(keys, values)
        if self.only_fill:
            raise FilledError
        views = [store.view() for store in self.stores]
        return self._padded([k for k, _ in views]), self._padded([v for _, v in views])

    def _padded(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0][None]
        heads, _, size = parts[0].shape
        padded = parts[0].new_zeros(len(parts), heads, self.width, size)
        for row, part in zip(padded, parts, strict=True):
            row[:, self.width - part.shape[1] :] = part
        return padded

    def get_seq_length(self) -> int:
        """Return the number of past positions the model should believe in."""
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (key length, offset of the first key)."""
        return self.past + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the stores grow."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


def group_cache(slots: Sequence[Slot], starts: Sequence[int], rows: int) -> Cache:
    """Return the cache a model sees while ``rows`` new rows of each of these texts run."""
    return Cache(layers=[GroupLayer(stores, starts, rows) for stores in zip(*slots, strict=True)])


def padding_mask(starts: Sequence[int], rows: int, device: torch.device) -> Tensor | None:
    """Return ``[B, width]``, 1 for real keys, or None when nothing is padded."""
    past = max(starts)
    if min(starts) == past:
        return None
    columns = torch.arange(past + rows, device=device)
    first = past - torch.tensor(starts, device=device)
    return (columns >= first[:, None]).long()
