"""The registry of exit signals: one file, one function each, found by its file's name.

A signal takes a :class:`~offramp.probe.Probe` of S rows and returns ``[S]``: higher means safer
to leave. It is pure and pointwise: a row's score depends on that row alone, so one function judges
one token online and a million offline. ``signal(low, high)`` states the range of its values. Other
packages add theirs under the entry-point group ``offramp.signals``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from torch import Tensor

from offramp.errors import UsageError
from offramp.probe import Probe


@dataclass(frozen=True)
class Signal:
    """A score per row, higher = safer to leave, with the range its values lie in."""

    function: Callable[[Probe], Tensor]
    low: float
    high: float
    looks_back: bool = False
    """Whether it compares with the exit before: its value then depends on which exits there are."""

    def __call__(self, probe: Probe) -> Tensor:
        """Return the score of each row, ``[S]``."""
        return self.function(probe)


def signal(
    low: float, high: float, *, looks_back: bool = False
) -> Callable[[Callable[[Probe], Tensor]], Signal]:
    """Make a function an exit signal whose values lie in ``[low, high]``."""
    return lambda function: Signal(function, low, high, looks_back)


@cache
def registry() -> dict[str, Signal]:
    """Return every signal by name: this folder's files first, then entry points.

    Raises:
        UsageError: two packages register the same name.
    """
    found: dict[str, Signal] = {}
    for module in pkgutil.iter_modules(__path__):
        found[module.name] = getattr(
            importlib.import_module(f"{__name__}.{module.name}"), module.name
        )
    for point in entry_points(group="offramp.signals"):
        if point.name in found:
            raise UsageError(f"two packages register an exit signal named {point.name!r}")
        found[point.name] = point.load()
    return found


def find(name: str) -> Signal:
    """Return the signal of this name.

    Raises:
        UsageError: no such signal.
    """
    signals = registry()
    if name not in signals:
        raise UsageError(f"unknown signal {name!r}; there are {', '.join(sorted(signals))}")
    return signals[name]


def score(probe: Probe, name: str) -> Tensor:
    """Return the signal ``name`` of each row, ``[S]``, computed once per probe."""
    if name not in probe.scores:
        probe.scores[name] = find(name)(probe)
    return probe.scores[name]
