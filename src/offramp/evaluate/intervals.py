"""Means with bootstrap intervals, and paired differences. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RESAMPLES = 10_000
_MOST = 2**22
"""Values drawn at once."""

Shown = Callable[[Tensor], Tensor]
"""From a mean to the figure that is shown, such as a loss to a perplexity; element by element."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much better one arm scores than another on the same texts."""

    mean: float
    low: float
    """End of the 95% interval: a loss down to here is not excluded."""
    high: float
    lower_share: float
    """Share of resamples in which it scores worse."""

    @property
    def verdict(self) -> Literal["higher", "not lower", "lower"]:
        """Say which side of 0 the interval lies on; "not lower" where it holds 0: none is shown."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "not lower"


def interval(
    scores: Sequence[float],
    seed: int = 0,
    *,
    weights: Sequence[float] | None = None,
    shown: Shown = torch.clone,
) -> Interval:
    """Return the mean of scores with its 95% percentile bootstrap interval (Efron 1979).

    Args:
        scores: one per text; texts are drawn with replacement.
        seed: of the draws.
        weights: what each text counts, such as its tokens; 1 by default.
        shown: what is shown of a mean.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("0 scores have no mean")
    [values] = _resampled([scores], seed, weights)
    return Interval(*_summary(shown(values)))


def paired(
    scores: Sequence[float],
    baseline: Sequence[float],
    seed: int = 0,
    *,
    weights: Sequence[float] | None = None,
    shown: Shown | None = None,
) -> Difference:
    """Return the mean of score minus baseline with its 95% percentile bootstrap interval.

    Texts are drawn with replacement, a text's two scores always together (Koehn 2004). With
    ``shown``, it is the difference of the figures shown of the two means.

    Raises:
        ValueError: not as many scores as of the baseline, or none.
    """
    if len(scores) != len(baseline) or not scores:
        raise ValueError(f"{len(scores)} scores against {len(baseline)}")
    if shown is None:
        # Of the gains themselves: a resample of gains of 0 then has the mean 0, and not almost.
        gains = [own - other for own, other in zip(scores, baseline, strict=True)]
        [values] = _resampled([gains], seed, weights)
    else:
        own_means, other_means = _resampled([scores, baseline], seed, weights)
        values = shown(own_means) - shown(other_means)
    mean, low, high = _summary(values)
    return Difference(mean, low, high, (values[1:] < 0).double().mean().item())


def _resampled(
    columns: Sequence[Sequence[float]], seed: int, weights: Sequence[float] | None
) -> Tensor:
    """Return each column's own mean, and then its means over the same resamples, ``[C, 1 + R]``."""
    known = torch.tensor(columns, dtype=torch.float64)
    size = known.shape[1]
    counts = torch.tensor(weights or [1.0] * size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def means(drawn: Tensor) -> Tensor:
        return (known * counts)[:, drawn].sum(-1) / counts[drawn].sum(-1)

    parts = [means(torch.arange(size)[None])]
    chunk = max(min(_MOST // size, RESAMPLES), 1)
    for done in range(0, RESAMPLES, chunk):
        shape = (min(chunk, RESAMPLES - done), size)
        parts.append(means(torch.randint(size, shape, generator=generator)))
    return torch.cat(parts, 1)


def _summary(values: Tensor) -> tuple[float, float, float]:
    """Return the first value, and the ends of the interval of the others."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(values[1:], ends).tolist()
    return values[0].item(), low, high
