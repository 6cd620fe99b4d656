"""Cheap stand-ins for a vocabulary head: a head of low rank. Knows no models."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_GAIN = 1e-3
"""Share of the largest gain below which a width of the state counts as this much."""


def low_rank(weight: Tensor, gains: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``up [V, rank]`` and ``down [rank, D]`` whose product is nearest to ``weight [V, D]``.

    Nearest for states as the last norm makes them: their widths are as large as its ``gains
    [D]``, so this is the singular value decomposition of ``weight * gains`` (Eckart and Young
    1936). At full rank the product is ``weight``.
    """
    scale = gains.float().abs()
    scale = scale.clamp_min(max(_LEAST_GAIN * scale.max().item(), torch.finfo().tiny))
    scaled = weight.float() * scale
    # Right singular vectors out of [D, D]: of a vocabulary of 100,000 the left ones take minutes.
    vectors = torch.linalg.eigh((scaled.T @ scaled).double()).eigenvectors
    kept = vectors.float().flip(1)[:, :rank]  # eigenvalues ascend
    return scaled @ kept, kept.T / scale
