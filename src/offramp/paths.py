"""Paths: the ordered layers a whole text runs. Layers off the path are never called or attended.

Of a layer a path may hold one half alone, its attention or its MLP; the other half then adds
nothing to the state. What stands in a path is a *part*: an index, or an index and a mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from offramp.errors import UsageError

ATTENTION, MLP = 1 << 20, 1 << 21
"""Marks on a layer's index: only this half of it runs. The kernels know the same two."""
_HALVES = {"a": ATTENTION, "m": MLP}
_NAMED = re.compile(r"(0|[1-9][0-9]{0,5})([am])")


def layer_of(part: int) -> int:
    """Return the layer that a part is, or is a half of."""
    return part & (ATTENTION - 1)


def is_whole(part: int) -> bool:
    """Return whether a part is a whole layer."""
    return part < ATTENTION


def attends(part: int) -> bool:
    """Return whether a part has the layer's attention, and so its keys and values."""
    return not part & MLP


def named(part: int) -> int | str:
    """Return a part as people write it: 7, or "7a" for its attention and "7m" for its MLP."""
    if is_whole(part):
        return part
    return f"{layer_of(part)}{'a' if attends(part) else 'm'}"


def _read(written: Any) -> Any:
    """Return the part that "7a" or "7m" names; anything else is for pydantic to judge."""
    found = _NAMED.fullmatch(written) if isinstance(written, str) else None
    return written if found is None else int(found[1]) | _HALVES[found[2]]


Part = Annotated[int, BeforeValidator(_read), PlainSerializer(named)]
"""A part in a plan: a layer's index, or "7a" or "7m"."""


def prefix(depth: int, num_layers: int) -> tuple[int, ...]:
    """Return the sub-model of the first ``depth`` layers (Sorted LLaMA, section 3.1).

    Raises:
        UsageError: depth outside 1 to L.
    """
    if not 1 <= depth <= num_layers:
        raise UsageError(f"depth {depth} is outside 1 to {num_layers}")
    return tuple(range(depth))


def unified_skip(budget: int, num_layers: int) -> tuple[int, ...]:
    """Return ``budget`` evenly spread layers: Unified Layer Skipping (Liu et al. 2024).

    Layer l is kept iff ``kept so far * L <= l * budget``, as *Dynamic layer selection in
    decoder-only transformers* (Glavas et al. 2024) uses it; in closed form ``ceil(i L / budget)``.

    Raises:
        UsageError: budget outside 1 to L.
    """
    if not 1 <= budget <= num_layers:
        raise UsageError(f"a budget of {budget} layers is outside 1 to {num_layers}")
    kept: list[int] = []
    for layer in range(num_layers):
        if len(kept) * num_layers <= layer * budget:
            kept.append(layer)
    return tuple(kept)


def check_parts(parts: Sequence[int], num_layers: int) -> None:
    """Refuse a path the model does not have; it may hold halves of layers.

    Raises:
        UsageError: empty, its layers not strictly ascending, or out of range.
    """
    layers = [part if part < 0 else layer_of(part) for part in parts]
    marked = all(part >> 20 in (0, 1, 2) for part in parts if part >= 0)
    if not parts or not marked or any(b <= a for a, b in pairwise(layers)):
        raise UsageError(
            f"a path is one or more ascending layers, or halves of them, not {[*map(named, parts)]}"
        )
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise UsageError(
            f"path {[*map(named, parts)]} leaves the model's layers 0 to {num_layers - 1}"
        )


def check_path(layers: Sequence[int], num_layers: int) -> None:
    """Refuse a path of whole layers that the model does not have.

    Raises:
        UsageError: empty, not strictly ascending, or out of range.
    """
    if not layers or any(b <= a for a, b in pairwise(layers)):
        raise UsageError(f"a path is one or more ascending layers, not {[*map(named, layers)]}")
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise UsageError(
            f"path {[*map(named, layers)]} leaves the model's layers 0 to {num_layers - 1}, which "
            "have to be whole here"
        )
