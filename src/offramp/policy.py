"""Policies: at which exits to ask, and whether to leave. Pure; one code for online and replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from offramp.errors import UsageError
from offramp.probe import Probe
from offramp.signals import find, score
from offramp.watch import Bars


class Policy(Protocol):
    """Where a token may leave, and whether it does."""

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths at which to ask, ascending, each from 1 to L-1; to L, where a short head may spare
        a token the full one."""

    @property
    def bars(self) -> Bars | None:
        """What a row must reach at each exit, so that a backbone may pass one by itself.

        None, where it is no threshold of one score: ``leave`` is then asked at every exit.
        """

    def leave(self, probe: Probe) -> Tensor:
        """Return ``[S]`` bool: which of the probe's rows leave here."""


def check_exits(exits: Sequence[int], num_layers: int, *, short_head: bool = False) -> None:
    """Refuse exits that the model does not have.

    Args:
        exits: depths.
        num_layers: the model's, L.
        short_head: whether something cheaper than the full head chooses the tokens that leave:
            they may then leave after the last layer, too, and save the head.

    Raises:
        UsageError: not strictly ascending, or outside 1 to L-1 (to L with a short head).
    """
    if any(b <= a for a, b in pairwise(exits)):
        raise UsageError(f"exits must ascend without repeats, not {list(exits)}")
    most = num_layers if short_head else num_layers - 1
    if exits and (exits[0] < 1 or exits[-1] > most):
        only = "" if short_head else ", and leaving after the last one needs a short head"
        raise UsageError(
            f"exits {list(exits)} are outside 1 to {most}: the model has {num_layers} layers{only}"
        )


@dataclass(frozen=True)
class Threshold:
    """Leave at the first exit whose signal reaches that exit's threshold.

    With ``max_prob`` this is LITE and the instance-aware inference of Sorted LLaMA (section 3.3);
    with ``margin`` or ``saturation``, CALM.
    """

    signal: str
    thresholds: tuple[tuple[int, float], ...]
    """(depth, lowest score that leaves), ascending by depth."""

    def __post_init__(self) -> None:
        signal = find(self.signal)
        for depth, value in self.thresholds:
            # +inf is how a sweep says "never here"; NaN would silently say the same.
            if not (signal.low <= value <= signal.high or value == math.inf):
                raise UsageError(
                    f"threshold {value} at exit {depth} is not in the range of {self.signal}, "
                    f"{signal.low:g} to {signal.high:g}"
                )

    @property
    def exits(self) -> tuple[int, ...]:
        """Return the depths that have a threshold."""
        return tuple(depth for depth, _ in self.thresholds)

    @cached_property
    def bars(self) -> Bars:
        """Return the thresholds."""
        return Bars(self.signal, self.thresholds)

    def leave(self, probe: Probe) -> Tensor:
        """Return where the signal reaches the threshold of this depth."""
        return score(probe, self.signal) >= dict(self.thresholds)[probe.depth]


def fixed(depth: int) -> Threshold:
    """Return the policy that leaves after ``depth`` layers, whatever it sees."""
    return Threshold("fixed", ((depth, 1.0),))


FULL = Threshold("fixed", ())
"""Run every layer: a policy that is never asked."""
