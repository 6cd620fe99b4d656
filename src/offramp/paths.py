"""Paths: the ordered layers a whole text runs. Layers off the path are never called or attended."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from offramp.errors import UsageError


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


def check_path(layers: Sequence[int], num_layers: int) -> None:
    """Refuse a path the model does not have.

    Raises:
        UsageError: empty, not strictly ascending, or out of range.
    """
    if not layers or any(b <= a for a, b in pairwise(layers)):
        raise UsageError(f"a path is one or more ascending layers, not {list(layers)}")
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise UsageError(f"path {list(layers)} leaves the model's layers 0 to {num_layers - 1}")
