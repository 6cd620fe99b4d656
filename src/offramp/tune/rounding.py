"""Trains weights through the rounding of int4: they are judged where they will be put."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from offramp.errors import UsageError
from offramp.fast.pack import GROUP, nearest, quantise


class Rounded(nn.Module):
    """The weights of a matrix on the steps of int4 that :mod:`offramp.fast.pack` gives it.

    Steps are those of the weights as they begin. In each group of 32, one weight at either end of
    the steps stays there, so that packing what was learnt finds the same steps, and rounds nothing
    a second time.
    """

    step: Tensor
    minimum: Tensor
    ends: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        step, minimum, codes = quantise(_padded(weight), "int4")
        grouped = codes.view(*step.shape, GROUP)
        ends = torch.zeros_like(grouped, dtype=torch.bool)
        for end in (0, 15):
            there = grouped == end
            ends |= there & (there.cumsum(-1) == 1)  # the first of them
        self.register_buffer("step", step.float()[..., None], persistent=False)
        self.register_buffer("minimum", minimum.float()[..., None], persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weights ``[O, I]`` rounded; their gradient is the rounded ones'."""
        rounded: Tensor = _Through.apply(weight, self)  # type: ignore[no-untyped-call]
        return rounded


class _Through(torch.autograd.Function):
    """Rounds on the way forward, and passes gradients on as if it had not (straight through)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Rounded) -> Tensor:
        ctx.ends = grid.ends
        groups = _padded(weight).view(grid.ends.shape)
        codes = nearest(groups, grid.step, grid.minimum, 15)
        return _cut(codes.mul_(grid.step).add_(grid.minimum), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.masked_fill(_cut(ctx.ends, gradient), 0), None


def _padded(weight: Tensor) -> Tensor:
    return pad(weight.detach().float(), (0, -weight.shape[1] % GROUP))


def _cut(groups: Tensor, weight: Tensor) -> Tensor:
    """Return groups ``[O, I / 32, 32]`` as a matrix as wide as this one."""
    return groups.flatten(1)[:, : weight.shape[1]]


def _matrices(layers: Iterable[nn.Module]) -> list[nn.Linear]:
    return [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]


def round_layers(layers: Iterable[nn.Module]) -> None:
    """Let every matrix of these decoder layers be seen rounded from now on.

    Raises:
        UsageError: they have none that the kernels hold in int4.
    """
    matrices = _matrices(layers)
    if not matrices:
        raise UsageError("--rounding int4: this model's layers are none that int4 can hold")
    for matrix in matrices:
        parametrize.register_parametrization(matrix, "weight", Rounded(matrix.weight))


def settle(layers: Iterable[nn.Module]) -> None:
    """Leave the rounded weights in the matrices' places; unrounded layers stay as they are."""
    for matrix in _matrices(layers):
        if parametrize.is_parametrized(matrix, "weight"):
            parametrize.remove_parametrizations(matrix, "weight", leave_parametrized=True)
