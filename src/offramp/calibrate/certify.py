"""From one trace to a certificate: split, order a path, test along it, look once at held-out text.

Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing; or conformal risk control
(Angelopoulos et al. 2022), which bounds the expected risk and has no delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.calibrate.bounds import BOUNDS, Floats, PValue, fewest, more_needed
from offramp.calibrate.replays import Replays
from offramp.calibrate.risks import RISKS
from offramp.calibrate.settings import safe_to_cheap
from offramp.errors import OfframpError, UsageError

CONFORMAL = "conformal"
METHODS = (*BOUNDS, CONFORMAL)
_AT_ONCE = 16
_FEWEST = 4
"""Sequences of the smallest part: below that nothing is measured."""

Indices = NDArray[np.int64]


class CannotCertifyError(OfframpError):
    """No setting could be certified with this much text; the message says how much more would."""


@dataclass(frozen=True)
class Goal:
    """What is to be certified."""

    risk: str = "disagreement"
    alpha: float = 0.1
    delta: float = 0.1
    method: str = "hoeffding-bentkus"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not 0 < value < 1:
                raise UsageError(f"{name} must lie between 0 and 1, both excluded, not {value}")
        if self.risk not in RISKS:
            raise UsageError(f"unknown risk {self.risk!r}; there are {', '.join(RISKS)}")
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; there are {', '.join(METHODS)}")
        if self.method == "binomial" and not RISKS[self.risk].binary:
            raise UsageError(
                "the binomial bound is exact for risks that are 0 or 1 per sequence (divergence, "
                "error); take hoeffding-bentkus or betting for this one"
            )

    @property
    def fewest(self) -> int:
        """Return the fewest sequences to test on that could ever be enough."""
        if self.method == CONFORMAL:
            return int(np.ceil(1 / self.alpha)) - 1 or 1
        return fewest(self.alpha, self.delta, BOUNDS[self.method])


class Parts(NamedTuple):
    """Sequences by what they are for; no part sees another's."""

    order: Indices
    """A quarter: chooses thresholds to try, and the path."""
    test: Indices
    """Half: what the certificate rests on."""
    held_out: Indices
    """A quarter: looked at once, after the certificate."""


def split(count: int, seed: int) -> Parts:
    """Return a random split of ``count`` sequences, a function of the seed alone."""
    shuffled = np.random.default_rng(seed).permutation(count)
    quarter = count // 4
    return Parts(shuffled[:quarter], shuffled[quarter:-quarter], shuffled[-quarter:])


def must_be_enough(count: int, goal: Goal) -> None:
    """Refuse a data set with which nothing could be certified, whatever is in it.

    Raises:
        CannotCertifyError: too few sequences; says how many are needed.
    """
    needed = max(2 * goal.fewest, 4 * _FEWEST)
    if count < needed:
        raise CannotCertifyError(
            f"cannot certify with {count} sequences, half of which are tested: even without a "
            f"single loss, alpha {goal.alpha} and delta {goal.delta} need {needed} by "
            f"{goal.method}; about {needed - count} more sequences would be needed"
        )


@dataclass(frozen=True)
class Found:
    """The setting that was certified."""

    setting: int
    """Its index among the replays' settings."""
    value: float
    """Its p-value; by conformal risk control, its bound on the expected risk."""
    cost: float
    """Predicted on the part that ordered the path; full depth = 1."""
    risk: float
    """Mean loss of the tested sequences."""
    tested: int
    """Settings of the path that were certified on the way, this one among them."""


def certify(
    replays: Replays,
    cost: Floats,
    order: Indices,
    test: Indices,
    goal: Goal,
    bound: PValue | None = None,
) -> Found | None:
    """Return the cheapest setting of the path that is certified, or None.

    The path is a function of ``order`` alone. Testing goes down it while the p-value is at most
    delta: the probability that any setting passed so has a risk above alpha is at most delta.

    Args:
        replays: what all settings do to all sequences.
        cost: ``[M]``, predicted on ``order``.
        order: sequences that order the path.
        test: other sequences, which are tested; repeats are allowed where they were drawn so.
        goal: risk, alpha, delta and method.
        bound: in place of the goal's own, for trying one out.
    """
    path = path_of(replays, cost, order, goal)
    losses = replays.losses[goal.risk][path[:, None], test]
    if goal.method == CONFORMAL and bound is None:
        values, level = conformal(losses), goal.alpha
    else:
        values, level = _down(losses, bound or BOUNDS[goal.method], goal), goal.delta
    passed = int(np.cumprod(values <= level).sum())
    if not passed:
        return None
    last = int(path[passed - 1])
    risk = float(losses[passed - 1].mean())
    return Found(last, float(values[passed - 1]), float(cost[last]), risk, passed)


def _down(losses: Floats, bound: PValue, goal: Goal) -> Floats:
    """Return p-values down the path, ``[k]`` from ``[K, n]``: enough to see where it ends."""
    parts: list[Floats] = []
    for start in range(0, len(losses), _AT_ONCE):
        parts.append(bound(losses[start : start + _AT_ONCE], goal.alpha))
        if parts[-1][-1] > goal.delta:
            break
    return np.concatenate(parts)


def path_of(replays: Replays, cost: Floats, order: Indices, goal: Goal) -> Indices:
    """Return the settings to test, from the safest to the cheapest on ``order``."""
    return safe_to_cheap(replays.losses[goal.risk][:, order].mean(-1), cost)


def conformal(losses: Floats) -> Floats:
    """Return the bound on the expected loss of every setting of a path, ``[K]`` from ``[K, n]``.

    Conformal risk control, equation 4: (n mean + 1) / (n + 1), for losses that only grow along the
    path. These need not, so each is raised to the most that its sequence lost before on the path:
    that grows, and is never less than the loss itself.
    """
    grown = np.maximum.accumulate(losses, 0)
    bounds: Floats = (grown.sum(-1) + 1) / (losses.shape[-1] + 1)
    return bounds


def refusal(
    replays: Replays, cost: Floats, order: Indices, test: Indices, goal: Goal
) -> CannotCertifyError:
    """Return what to say where no setting passes: how many more sequences would do, if any."""
    safest = path_of(replays, cost, order, goal)[0]
    losses = replays.losses[goal.risk][safest][test]
    rate = float(losses.mean())
    said = (
        f"cannot certify {goal.risk} at most {goal.alpha} with n = {len(test)}: at the safest "
        f"setting that was tried it is {rate:.3f}"
    )
    if goal.method == CONFORMAL:
        more = int((1 - goal.alpha) / (goal.alpha - rate)) if rate < goal.alpha else None
        more = None if more is None else max(more - len(test), 1)
    else:
        more = more_needed(losses, goal.alpha, goal.delta, BOUNDS[goal.method])
    if more is None:
        return CannotCertifyError(f"{said}, and no number of sequences would change that")
    return CannotCertifyError(
        f"{said}; about {2 * more} more sequences would be needed, half of which are tested"
    )
