"""Lays weight matrices out for the kernels, in each format. Knows no models.

A block is 16 outputs. int8 is for accuracy: its states have 16 bits; int4 for speed: they have 8.
Both hold each group of 32 inputs of an output as
``step * code + minimum`` with step and minimum in half precision, as GGUF's Q4_1 does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from offramp.fast.layout import BF16, FP32, INT4, INT8_FINE

Format = Literal["fp32", "bf16", "int8", "int4"]

LANES, GROUP = 16, 32
BYTES: dict[Format, float] = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / GROUP, "int4": 0.5 + 4 / GROUP}
_STEPPED = 1 + 3 / GROUP
KV_BYTES: dict[Format, float] = {"fp32": 4, "bf16": 4, "int8": _STEPPED, "int4": _STEPPED}
"""Of a stored coordinate: bytes have a step in fp32 per 32 of a key and 64 of a value."""
_CODES = {"fp32": FP32, "bf16": BF16, "int8": INT8_FINE, "int4": INT4}
_AT_ONCE = 1 << 19  # weights quantised at once: what comes between should stay in the cache
_SAME = 1e-3  # of a step: weights that are no further off are those of the grid
_FINE = 15 * 16.618
"""Steps in the range of a group that no coarser grid holds.

Not 255, which is 17 for each of Q4_1's: there every weight that was tuned by less than half a step
would fall back to where it was, and all of the tuning with it. The golden ratio's fraction meets a
coarser grid as evenly as can be, so that some go up and some go down.
"""


@dataclass(frozen=True)
class Packed:
    """A matrix in the kernels' layout."""

    data: Tensor  # uint8
    format: int
    outputs: int
    inputs: int
    """Rounded up to whole groups."""


def pack(weight: Tensor, form: Format) -> Packed:
    """Return ``weight [outputs, inputs]`` in the kernels' layout."""
    padded = _padded(weight)
    if form == "fp32":
        data = padded.view(-1, LANES, padded.shape[1]).transpose(1, 2)
    elif form == "bf16":
        pairs = padded.bfloat16().view(-1, LANES, padded.shape[1] // 2, 2)
        data = pairs.transpose(1, 2).contiguous().view(torch.int16)
    else:
        data = _blocks(*quantise(padded, form), form)
    return _laid_out(data, form, weight)


def pack_roughly(weight: Tensor, shares: Tensor) -> tuple[Packed, Tensor]:
    """Return ``weight [outputs, inputs]`` in int4, and how far its products are off.

    Steps go from each group's least to its largest weight; no better places are tried, which takes
    several times as long. The second is per output, ``[outputs]``: the variance of its product with
    a state of norm 1, of whose square the inputs have these ``shares [inputs]``.
    """
    padded, spread = _padded(weight), functional.pad(shares, (0, -len(shares) % GROUP))
    parts, errors = [], []
    for rows in _split(padded):
        groups = rows.view(len(rows), -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        step, minimum = ((high - low) / 15).half(), low.half()
        codes = nearest(groups, step.float()[..., None], minimum.float()[..., None], 15)
        parts.append((step, minimum, codes.to(torch.uint8).flatten(1)))
        errors.append((dequantise(*parts[-1]) - rows).square() @ spread)
    step, minimum, codes = (torch.cat(column) for column in zip(*parts, strict=True))
    packed = _laid_out(_blocks(step, minimum, codes, "int4"), "int4", weight)
    return packed, torch.cat(errors)[: len(weight)]


def rounding(weight: Tensor, shares: Tensor) -> Tensor:
    """Return how far products with ``weight [outputs, inputs]`` in int8 are off, as above.

    By the width of the steps, without looking where each weight falls between two.
    """
    padded, spread = _padded(weight), functional.pad(shares, (0, -len(shares) % GROUP))
    groups = padded.view(len(padded), -1, GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / _FINE
    return (step.square() / 12 @ spread.view(-1, GROUP).sum(-1))[: len(weight)]


def widest(weight: Tensor) -> Tensor:
    """Return the mean square of each output's largest group of weights, ``[outputs]``."""
    parts = (_padded(rows).square() for rows in _split(weight))
    means = [part.view(len(part), -1, GROUP).mean(-1).amax(-1) for part in parts]
    return torch.cat(means)[: len(weight)]


def _split(weight: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = weight.split(max(1, _AT_ONCE // weight.shape[1]))
    return parts


def _padded(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    spare = (-inputs % GROUP, -outputs % LANES)
    return functional.pad(weight.detach().float(), (0, spare[0], 0, spare[1]))


def _laid_out(data: Tensor, form: Format, weight: Tensor) -> Packed:
    outputs, inputs = weight.shape
    flat = data.contiguous().view(torch.uint8).flatten()
    return Packed(flat, _CODES[form], outputs, inputs + -inputs % GROUP)


def _blocks(step: Tensor, minimum: Tensor, codes: Tensor, form: Format) -> Tensor:
    """Return ``[blocks, groups, bytes]``: steps, minima, codes."""
    groups = step.shape[1]
    heads = [part.view(-1, LANES, groups).transpose(1, 2) for part in (step, minimum)]
    fours = codes.view(-1, LANES, groups, 8, 4).permute(0, 2, 3, 1, 4)  # [b, g, 8, 16, 4]
    if form == "int4":
        fours = fours[:, :, ::2] | (fours[:, :, 1::2] << 4)
    body = fours.reshape(len(fours), groups, -1)
    return torch.cat([*(h.contiguous().view(torch.uint8) for h in heads), body], dim=-1)


def quantise(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps and minima (fp16, ``[O, I / 32]``) and codes (uint8, ``[O, I]``).

    In int4, of several ways to place the steps, each group takes the one with the least squared
    error. In both, weights that were de-quantised from GGUF's Q4_1 or Q8_0, and in int4 Q4_0, are
    found again without a second rounding.
    """
    parts = [_quantised(rows, form) for rows in _split(weight)]
    step, minimum, codes = (torch.cat(column) for column in zip(*parts, strict=True))
    return step, minimum, codes


def dequantise(step: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
    """Return the weights that these stand for, ``[O, I]`` in fp32."""
    grouped = codes.view(*step.shape, GROUP).float()
    return (step[..., None].float() * grouped + minimum[..., None].float()).flatten(1)


def _quantised(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    least = torch.full(groups.shape[:2], torch.inf)
    step, minimum = torch.zeros_like(least).half(), torch.zeros_like(least).half()
    codes = torch.zeros_like(groups)
    for grid in _grids(groups, form):
        most = 15 if form == "int4" else 255
        found = nearest(groups, grid.step.float()[..., None], grid.minimum.float()[..., None], most)
        width = grid.step.float()[..., None]
        error = (width * found + grid.minimum.float()[..., None] - groups).square().sum(-1)
        if grid.whole:
            same = error <= GROUP * (_SAME * grid.step.float()).square()
            error = torch.where(same, 0, torch.inf)
        better = error < least
        least = torch.where(better, error, least)
        step = torch.where(better, grid.step, step)
        minimum = torch.where(better, grid.minimum, minimum)
        codes = torch.where(better[..., None], found, codes)
        if not least.any():  # as with weights de-quantised from the same format
            break
    return step, minimum, codes.to(torch.uint8).flatten(1)


@dataclass(frozen=True)
class _Grid:
    """Where the steps of each group may lie, in half precision, ``[O, I / 32]``."""

    step: Tensor
    minimum: Tensor
    whole: bool = False
    """Whether only groups take it that it holds as they are."""


def _grids(groups: Tensor, form: Format) -> Iterator[_Grid]:
    """Yield those to try."""
    low, high = groups.amin(-1), groups.amax(-1)
    extreme = torch.where(high.abs() > low.abs(), high, low)
    if form == "int4":
        yield _Grid(((high - low) / 15).half(), low.half())  # Q4_1
        half = (extreme / -8).half()
        yield _Grid(half, (half.float() * -8).half())  # Q4_0: the extreme is code 0
        for share in (0.95, 0.9, 0.85):  # clipping the ends can place the rest better
            middle, reach = (low + high) / 2, (high - low) / 2 * share
            yield _Grid((2 * reach / 15).half(), (middle - reach).half())
        return
    step = (extreme.abs() / 127).half()
    yield _Grid(((high - low) / 15).half(), low.half(), whole=True)  # Q4_1
    yield _Grid(step, (step.float() * -128).half(), whole=True)  # Q8_0
    yield _Grid(((high - low) / _FINE).half(), low.half())


def nearest(groups: Tensor, step: Tensor, minimum: Tensor, most: int) -> Tensor:
    """Return the codes, 0 to ``most``, of the steps that are nearest to these weights.

    Args:
        groups: ``[O, I / 32, 32]``.
        step: ``[O, I / 32, 1]``; where it is 0, every code is.
        minimum: likewise, where code 0 lies.
        most: the largest code.
    """
    inverse = torch.where(step == 0, 0, 1 / step)
    return ((groups - minimum) * inverse).round().clamp(0, most)
