"""Does a certificate hold as often as it says? Repeats the whole procedure and counts violations.

Each repeat draws its sequences from the trace with replacement: the trace is then the population,
its risk under any setting is known exactly, and a violation needs no second judgement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from offramp.calibrate.bounds import PValue
from offramp.calibrate.certify import (
    CONFORMAL,
    Found,
    Goal,
    Indices,
    Parts,
    certify,
    split,
)
from offramp.calibrate.replays import Replays
from offramp.calibrate.settings import Price, costs

_NOISE = 0.01
"""How improbable a number of violations must be, were the certificate right, to be called wrong."""


@dataclass(frozen=True)
class Verification:
    """What came of the repeats."""

    repeats: int
    certified: int
    """Repeats that certified a setting; the others cannot violate anything."""
    violations: int
    """Repeats whose setting has a risk above alpha on the population."""
    allowed: int
    """Violations up to which delta and chance explain them (level 0.01)."""
    mean_risk: float
    """Of the certified settings on the population, 0 where none was."""
    mean_cost: float
    """Of the same, 1 where none was."""
    held_out_above: int
    """Plain splits whose held-out part shows a risk above alpha; its own noise is in that."""

    @property
    def holds(self) -> bool:
        """Return whether the certificates are as good as they say."""
        return self.violations <= self.allowed


Try = tuple[Goal, PValue | None]
"""A goal, and perhaps a bound in place of its own: a broken one should be caught."""


def verify(
    replays: Replays,
    tries: Sequence[Try],
    price: Price,
    *,
    repeats: int = 200,
    seed: int = 0,
    progress: Iterable[int] | None = None,
) -> list[Verification]:
    """Repeat splitting, ordering and testing, and compare with what is known of the population.

    By conformal risk control a violation is not an event but a mean: ``violations`` still counts
    settings above alpha, and ``allowed`` is every repeat; look at ``mean_risk``.

    Args:
        replays: what all settings do to all sequences.
        tries: what each repeat certifies, all on the same draws.
        price: predicts costs.
        repeats: how many draws, and how many plain splits.
        seed: where the draws start.
        progress: ``range(repeats)``, perhaps under a bar.
    """
    count = len(replays.rows)
    random = np.random.default_rng(seed)
    drawn: list[list[Found]] = [[] for _ in tries]
    above = [0] * len(tries)
    for repeat in progress or range(repeats):
        some = random.integers(count, size=count)
        parts = split(count, seed + repeat)
        draw, plain = (_Sample(replays, ids, parts, price) for ids in (some, np.arange(count)))
        for i, (goal, bound) in enumerate(tries):
            drawn[i] += draw.certified(goal, bound)
            for found in plain.certified(goal, bound):
                losses = replays.losses[goal.risk][found.setting][parts.held_out]
                above[i] += bool(losses.mean() > goal.alpha)
    return [
        _counted(replays, goal, found, repeats, split_above)
        for (goal, _), found, split_above in zip(tries, drawn, above, strict=True)
    ]


class _Sample:
    """Sequences drawn for one repeat, in their parts."""

    def __init__(self, replays: Replays, ids: Indices, parts: Parts, price: Price) -> None:
        self.replays = replays
        self.order, self.test = ids[parts.order], ids[parts.test]
        self.cost = costs(replays, self.order, price)

    def certified(self, goal: Goal, bound: PValue | None) -> list[Found]:
        """Return what is certified: one setting or none."""
        found = certify(self.replays, self.cost, self.order, self.test, goal, bound)
        return [] if found is None else [found]


def _counted(
    replays: Replays, goal: Goal, found: Sequence[Found], repeats: int, above: int
) -> Verification:
    risks = [float(replays.losses[goal.risk][one.setting].mean()) for one in found]
    count = max(len(found), 1)
    return Verification(
        repeats=repeats,
        certified=len(found),
        violations=sum(risk > goal.alpha for risk in risks),
        allowed=repeats if goal.method == CONFORMAL else noise(repeats, goal.delta),
        mean_risk=math.fsum(risks) / count,
        mean_cost=math.fsum(one.cost for one in found) / count if found else 1.0,
        held_out_above=above,
    )


def noise(repeats: int, delta: float) -> int:
    """Return the number of violations that is exceeded with probability 0.01 at rate delta."""
    return int(binom.ppf(1 - _NOISE, repeats, delta))
