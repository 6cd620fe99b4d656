"""Positions, as the model itself sees them: rotary tables and windows, out of what it prepares."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from offramp.fast.layout import LayerStruct
from offramp.fast.parts import part, refusal
from offramp.hf.adapter import Adapter, Prepared
from offramp.hf.cache import LayerStore, group_cache

_CHANGING = ("dynamic", "longrope")  # their tables depend on how long the text is
# What else may stand there need not show in twelve tokens (Ministral 3 scales late queries).
_KNOWN = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("partial_rotary_factor", "original_max_position_embeddings"),
}
_STEP = 256


class Rotary:
    """Rotary tables of each layer, grown by asking the model for more positions."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._length = 0
        self._rotates = [_rotates(adapter, layer) for layer in adapter.layers]
        self._tables: list[tuple[Tensor, Tensor]] = []  # the different ones
        self._which: list[int] = []  # layer -> table
        _refuse_changing(adapter)
        self._extend()

    def size(self, head_size: int) -> int:
        """Return how many coordinates of a head are rotated."""
        sizes = {table.shape[-1] for pair in self._tables for table in pair}
        if len(sizes) > 1 or max(sizes) > head_size:
            raise refusal(self._adapter.model, "its rotary tables do not fit its heads")
        return sizes.pop()

    def reserve(self, positions: int, layers: ctypes.Array[LayerStruct]) -> None:
        """Have tables for this many positions, and tell the kernels where they lie."""
        if self.grow(positions):
            self.point(layers)

    def grow(self, positions: int) -> bool:
        """Have tables for this many positions; return whether that made new ones."""
        if positions <= self._length:
            return False
        goal = max(2 * self._length, positions, _STEP)
        while self._length < goal:
            self._extend()
        return True

    def table(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the layer's cosines and sines, ``[positions, rotary]`` each, if it rotates."""
        return self._tables[self._which[layer]] if self._rotates[layer] else None

    def point(self, layers: ctypes.Array[LayerStruct]) -> None:
        """Tell the layers where their tables lie."""
        last = len(self._which) - 1
        for index, struct in enumerate(layers):
            layer = min(index, last)  # an exit's block stands where the last layer does
            if self._rotates[layer]:
                struct.cosines, struct.sines = (
                    table.data_ptr() for table in self._tables[self._which[layer]]
                )

    def _extend(self) -> None:
        asked = prepared(self._adapter, self._length, _STEP)
        pairs = [_pair(self._adapter, kwargs) for _, kwargs in asked.calls]
        found: dict[int, int] = {}
        if not self._tables:
            for pair in pairs:
                self._which.append(found.setdefault(id(pair[0]), len(found)))
        fresh = [pairs[self._which.index(table)] for table in range(max(self._which) + 1)]
        parts = [(cos[0].float(), sin[0].float()) for cos, sin in fresh]
        if self._tables:
            parts = [
                (torch.cat((old[0], new[0])), torch.cat((old[1], new[1])))
                for old, new in zip(self._tables, parts, strict=True)
            ]
        self._tables = [(cos.contiguous(), sin.contiguous()) for cos, sin in parts]
        self._length += _STEP

    @property
    def kinds(self) -> list[object]:
        """Return, per layer, what tells its positions from other layers'."""
        return list(zip(self._which, self._rotates, strict=True))


def windows(adapter: Adapter) -> list[int]:
    """Return how many keys a row of each layer sees, 0 for all: what the model's masks let pass.

    Raises:
        UnsupportedModelError: the masks are no sliding windows.
    """
    config = adapter.model.config.get_text_config(decoder=True).to_dict()
    past = (config.get("sliding_window") or 64) + 8
    seen = [_visible(prepared(adapter, start, 1), start) for start in (past, past + 1)]
    for first, second in zip(*seen, strict=True):
        if first != second:
            raise refusal(
                adapter.model,
                "its layers see neither all earlier tokens nor a sliding window of them",
            )
    return seen[0]


def prepared(adapter: Adapter, start: int, rows: int) -> Prepared:
    """Return what the model prepares for ``rows`` tokens after ``start`` others."""
    device = adapter.model.device
    ids = torch.zeros(1, rows, dtype=torch.long, device=device)
    positions = torch.arange(start, start + rows, device=device)[None]
    slot = [LayerStore() for _ in adapter.layers]
    with torch.no_grad():
        return adapter.prepare(ids, positions, None, group_cache([slot], [start], rows))


def _visible(asked: Prepared, past: int) -> list[int]:
    counts = []
    for _, kwargs in asked.calls:
        mask = kwargs.get("attention_mask")
        if mask is None:
            counts.append(0)
            continue
        open_keys = mask if mask.dtype == torch.bool else mask == 0
        count = int(open_keys.sum())
        counts.append(0 if count == past + 1 else count)
    return counts


def _pair(adapter: Adapter, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pair = kwargs.get("position_embeddings")
    if pair is None or len(pair) != 2:
        raise refusal(adapter.model, "its layers get no rotary tables")
    return pair[0], pair[1]


def _rotates(adapter: Adapter, layer: nn.Module) -> bool:
    """Return whether this layer uses the tables it is given (SmolLM3 leaves some without)."""
    return bool(vars(part(adapter.model, layer, "self_attn")).get("use_rope", True))


def _refuse_changing(adapter: Adapter) -> None:
    config = adapter.model.config.get_text_config(decoder=True).to_dict()
    parameters = config.get("rope_parameters") or {}
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type")
        if kind in _CHANGING:
            raise refusal(
                adapter.model, f"its {kind} rotary tables change with the length of the text"
            )
        unknown = sorted(name for name in rope.keys() - _KNOWN if rope[name] is not None)
        if unknown:
            raise refusal(adapter.model, f"its positions depend on {unknown[0]}")
