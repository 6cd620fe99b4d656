"""Whether confidence is worth its name: a curve of it against agreement, and what shares are sure.

A reliability curve sorts tokens into bins of confidence and compares its mean with the share that
was right (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

BINS = 10
"""Bins of confidence in a reliability curve."""


def _empty() -> Tensor:
    return torch.zeros(BINS, dtype=torch.float64)


@dataclass
class Bins:
    """Tokens by confidence, added up as they come."""

    count: Tensor = field(default_factory=_empty)
    confidence: Tensor = field(default_factory=_empty)
    right: Tensor = field(default_factory=_empty)

    def add(self, sure: Tensor, right: Tensor) -> None:
        """Add tokens: ``sure`` ``[n]`` fp64 from 0 to 1, ``right`` ``[n]`` fp64, 0 or 1."""
        place = (sure * BINS).long().clamp(0, BINS - 1)
        self.count.scatter_add_(0, place, torch.ones_like(sure))
        self.confidence.scatter_add_(0, place, sure)
        self.right.scatter_add_(0, place, right)

    def curve(self) -> list[dict[str, Any]]:
        """Return tokens, mean confidence and agreement of each bin."""
        held = self.count.clamp_min(1)
        columns = (self.count, self.confidence / held, self.right / held)
        return [
            {"tokens": int(n), "confidence": c, "agreement": a}
            for n, c, a in zip(*(column.tolist() for column in columns), strict=True)
        ]


def share_interval(
    texts: Sequence[tuple[int, int]], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Return the interval of a share of tokens, or None of fewer than two texts.

    Tokens of one text depend on each other, so the texts are what is counted: the share is a ratio
    of two sums over texts, and its variance that of the ratio estimator (Cochran 1977, "Sampling
    Techniques", section 6.4), with the normal quantile. Rough for a handful of texts.

    Args:
        texts: (tokens that have it, tokens) of each text.
        confidence: of the interval.
    """
    known = [(have, tokens) for have, tokens in texts if tokens]
    if len(known) < 2:
        return None
    total = sum(tokens for _, tokens in known)
    share = sum(have for have, _ in known) / total
    squares = sum((have - share * tokens) ** 2 for have, tokens in known)
    error = (squares * len(known) / (len(known) - 1)) ** 0.5 / total
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return max(share - reach, 0.0), min(share + reach, 1.0)
