"""P-values for "the mean loss is above alpha", from one loss in [0, 1] per sequence.

A p-value here is *valid*: where the mean really is above alpha, it is at most u with probability at
most u, for any number of sequences and any distribution of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from offramp.errors import UsageError

Floats = NDArray[np.float64]
PValue = Callable[[Floats, float], Floats]
"""``(losses [..., n] in [0, 1], alpha) -> p-values [...]``."""

_MOST = 2**20
"""Sequences beyond which "how many more" is not answered."""
_TRUNCATE = 0.75
"""Share of the largest bet that could lose everything that is bet at most (WSR, section 4.1)."""
_ROUNDING = 1e-9


def hoeffding_bentkus(losses: Floats, alpha: float) -> Floats:
    """Return the smaller of Hoeffding's and Bentkus's tail (Learn then Test, proposition 4).

    Angelopoulos et al. 2021; Bates et al. 2021, theorem 4. For losses in [0, 1] of any kind.
    """
    n = losses.shape[-1]
    total = losses.sum(-1)
    mean = np.minimum(total / n, alpha)
    hoeffding = np.exp(-n * _relative_entropy(mean, alpha))
    bentkus = math.e * _binomial_tail(np.ceil(total - _ROUNDING), n, alpha)
    smallest: Floats = np.minimum(np.minimum(hoeffding, bentkus), 1.0)
    return smallest


def binomial(losses: Floats, alpha: float) -> Floats:
    """Return the exact probability of so few losses of 1, were the rate alpha; 0 and 1 only.

    Raises:
        UsageError: a loss between 0 and 1.
    """
    if ((losses != 0) & (losses != 1)).any():
        raise UsageError("the binomial bound is for losses of 0 and 1, and some lie between")
    return _binomial_tail(losses.sum(-1), losses.shape[-1], alpha)


def betting(losses: Floats, alpha: float) -> Floats:
    """Return 1 / the most wealth of a bettor against "the mean is above alpha".

    Waudby-Smith and Ramdas 2024: predictable plug-in bets (section 4.2, equation 26; Bates et al.
    2021, proposition 5), truncated; Ville's inequality makes the most wealth at any time valid.
    Looks at the losses in their order, and adapts to their variance.
    """
    n = losses.shape[-1]
    count = np.arange(1, n + 1)
    mean = (0.5 + losses.cumsum(-1)) / (count + 1)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(-1)) / (count + 1)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    # 2 log(1 / level): the level tunes the bets for the deltas that people ask, and bounds nothing.
    bets = np.minimum(np.sqrt(2 * math.log(20) / (n * before)), _TRUNCATE / (1 - alpha))
    wealth = np.log1p(bets * (alpha - losses)).cumsum(-1).max(-1, initial=0.0)
    p: Floats = np.exp(-wealth)
    return p


BOUNDS: dict[str, PValue] = {
    "hoeffding-bentkus": hoeffding_bentkus,
    "binomial": binomial,
    "betting": betting,
}


def more_needed(losses: Floats, alpha: float, delta: float, bound: PValue) -> int | None:
    """Return about how many more sequences with losses like these ``[n]`` would be certified.

    The losses at hand are repeated until the bound is small enough; None where no number up to a
    million does.
    """
    n = len(losses)

    def enough(count: int) -> bool:
        return bool(bound(np.resize(losses, count), alpha) <= delta)

    high = max(n, 1)
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = n if high == n else high // 2
    while high - low > max(low // 100, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high - n


def fewest(alpha: float, delta: float, bound: PValue) -> int:
    """Return the fewest sequences that could be certified: those that all have a loss of 0.

    None up to a million would do for a tiny alpha or delta: then that number is returned.
    """
    more = more_needed(np.zeros(1), alpha, delta, bound)
    return _MOST if more is None else 1 + more


def _relative_entropy(a: Floats, b: float) -> Floats:
    """Return h1(a, b), the divergence of two coins, with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(a > 0, a * np.log(a / b), 0.0)
        second = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    total: Floats = first + second
    return total


def _binomial_tail(most: Any, n: int, alpha: float) -> Floats:
    tail: Floats = np.asarray(binom.cdf(most, n, alpha), dtype=np.float64)
    return tail
