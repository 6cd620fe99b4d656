"""Exits that a backbone may pass without asking: what a row must reach there, in plain numbers.

Only a screen: it tells which rows are certain to stay. Where one may leave, the run stops and the
policy itself decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from offramp.probe import Readout


@dataclass(frozen=True, eq=False)
class Bars:
    """A policy as a threshold per exit: a row whose score is below it does not leave.

    A backbone that does not know the signal asks the policy at every exit. A policy makes its bars
    once: a backbone may keep what it made of them.
    """

    signal: str
    """Of the registry; or, where there are gates, theirs."""
    thresholds: tuple[tuple[int, float], ...]
    """(depth, lowest score that leaves), for every exit of the policy, ascending."""
    gates: Tensor | None = None
    """``[E, D + 1]`` of a logistic score: weights on states of root mean square 1, and the bias."""


@dataclass(frozen=True, eq=False, slots=True)
class Watch:
    """What to watch for on the way through several segments."""

    bars: Bars | None
    """None: every exit is to be asked."""
    look: Readout | None
    """What the check sees; None: the full head's logits."""
    rows: tuple[int, ...]
    """The rows that ask, ascending."""
    exits: Sequence[int]
    """Depth of each exit between the segments."""
    blocks: Sequence[int | None]
    """The layer of the block that each of them owns: the rows that ask run through it, all others
    fill its keys and values."""


@dataclass(frozen=True, eq=False, slots=True)
class Ran:
    """How far a run came."""

    hidden: Tensor
    """``[N, D]`` after the last segment that ran."""
    segments: int = 1
    """How many ran."""
    seen: Tensor | None = None
    """``[S, W]``: what the check saw of the asking rows at the exit where the run stopped, if the
    run looked."""
    made: Tensor | None = None
    """``[S, D]``: the asking rows behind the block of that exit, if the run went through it."""
