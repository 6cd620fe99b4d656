"""What a classifier sees of a row at an exit: signals and the depth, online as in a trace."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import UsageError
from offramp.probe import Probe
from offramp.signals import find, registry, score

DEPTH = "depth"
"""A feature beside the signals: the share of the model's layers that have run."""


def features(probe: Probe, names: tuple[str, ...]) -> Tensor:
    """Return the features of each row, ``[S, F]`` fp64: the same online and from a trace."""
    columns = [
        torch.full((len(probe.rows),), probe.depth / probe.num_layers, device=probe.rows.device)
        if name == DEPTH
        else score(probe, name)
        for name in names
    ]
    return torch.stack([column.double() for column in columns], 1)


def check_features(names: tuple[str, ...]) -> None:
    """Refuse names that are no features.

    Raises:
        UsageError: none, one twice, or one that is neither ``depth`` nor a signal.
    """
    known = {*registry(), DEPTH}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise UsageError(
            f"features {', '.join(names) or '(none)'}: name different ones of "
            f"{', '.join(sorted(known))}"
        )


def looks_back(name: str) -> bool:
    """Return whether a feature compares with the exit before."""
    return name != DEPTH and find(name).looks_back
