"""Does a certificate hold as often as it says? Repeats the whole procedure and counts violations.

Each repeat draws its sequences from the trace with replacement: the trace is then the population,
its risk under any setting is known exactly, and a violation needs no second judgement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from offramp.calibrate.bounds import PValue
from offramp.calibrate.certify import CONFORMAL, Goal, certify, split
from offramp.calibrate.replays import Replays
from offramp.calibrate.settings import Price

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


def verify(
    replays: Replays,
    goal: Goal,
    price: Price,
    *,
    repeats: int = 200,
    seed: int = 0,
    bound: PValue | None = None,
    progress: Iterable[int] | None = None,
) -> Verification:
    """Repeat splitting, ordering and testing, and compare with what is known of the population.

    By conformal risk control a violation is not an event but a mean: ``violations`` still counts
    settings above alpha, and ``allowed`` is every repeat; look at ``mean_risk``.

    Args:
        replays: what all settings do to all sequences.
        goal: what each repeat certifies.
        price: predicts costs.
        repeats: how many draws, and how many plain splits.
        seed: where the draws start.
        bound: in place of the goal's own: a broken one should be caught.
        progress: ``range(repeats)``, perhaps under a bar.
    """
    count, losses = len(replays.rows), replays.losses[goal.risk]
    random = np.random.default_rng(seed)
    risks, prices, above = [], [], 0
    for repeat in progress or range(repeats):
        drawn = random.integers(count, size=count)
        parts = split(count, seed + repeat)
        order, test = (drawn[part] for part in (parts.order, parts.test))
        found = certify(replays, order, test, goal, price, bound=bound)
        if found is not None:
            risks.append(float(losses[found.setting].mean()))
            prices.append(found.cost)
        plain = certify(replays, parts.order, parts.test, goal, price, bound=bound)
        if plain is not None:
            above += bool(losses[plain.setting][parts.held_out].mean() > goal.alpha)
    return Verification(
        repeats=repeats,
        certified=len(risks),
        violations=sum(risk > goal.alpha for risk in risks),
        allowed=repeats if goal.method == CONFORMAL else noise(repeats, goal.delta),
        mean_risk=math.fsum(risks) / max(len(risks), 1),
        mean_cost=math.fsum(prices) / len(prices) if prices else 1.0,
        held_out_above=above,
    )


def noise(repeats: int, delta: float) -> int:
    """Return the number of violations that is exceeded with probability 0.01 at rate delta."""
    return int(binom.ppf(1 - _NOISE, repeats, delta))
