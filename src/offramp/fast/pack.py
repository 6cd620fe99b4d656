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
_ROWS = 4096  # outputs quantised at once: bounds the memory that takes


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
    outputs, inputs = weight.shape
    spare = (-inputs % GROUP, -outputs % LANES)
    padded = functional.pad(weight.detach().float(), (0, spare[0], 0, spare[1]))
    if form == "fp32":
        data = padded.view(-1, LANES, padded.shape[1]).transpose(1, 2)
    elif form == "bf16":
        pairs = padded.bfloat16().view(-1, LANES, padded.shape[1] // 2, 2)
        data = pairs.transpose(1, 2).contiguous().view(torch.int16)
    else:
        data = _blocks(padded, form)
    data = data.contiguous().view(torch.uint8).flatten()
    return Packed(data, _CODES[form], outputs, padded.shape[1])


def _blocks(weight: Tensor, form: Format) -> Tensor:
    """Return ``[blocks, groups, bytes]``: steps, minima, codes."""
    step, minimum, codes = quantise(weight, form)
    groups = step.shape[1]
    heads = [part.view(-1, LANES, groups).transpose(1, 2) for part in (step, minimum)]
    fours = codes.view(-1, LANES, groups, 8, 4).permute(0, 2, 3, 1, 4)  # [b, g, 8, 16, 4]
    if form == "int4":
        fours = fours[:, :, ::2] | (fours[:, :, 1::2] << 4)
    body = fours.reshape(len(fours), groups, -1)
    return torch.cat([*(h.contiguous().view(torch.uint8) for h in heads), body], dim=-1)


def quantise(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps and minima (fp16, ``[O, I / 32]``) and codes (uint8, ``[O, I]``).

    Of several ways to place the steps, each group takes the one with the least squared error.
    Among them are those of GGUF's Q4_1, Q4_0 and Q8_0, so weights that were de-quantised from
    there are found again without a second rounding.
    """
    parts = [_quantised(rows, form) for rows in weight.split(_ROWS)]
    step, minimum, codes = (torch.cat(column) for column in zip(*parts, strict=True))
    return step, minimum, codes


def dequantise(step: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
    """Return the weights that these stand for, ``[O, I]`` in fp32."""
    grouped = codes.view(*step.shape, GROUP).float()
    return (step[..., None].float() * grouped + minimum[..., None].float()).flatten(1)


def _quantised(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full(groups.shape[:2], torch.inf)
    for step, minimum in _candidates(groups, form):
        codes = _codes(groups, step, minimum, 15 if form == "int4" else 255)
        made = step.float()[..., None] * codes + minimum.float()[..., None]
        error = (made - groups).square().sum(-1)
        found = (step, minimum, codes)
        if best is None:
            best, least = found, error
            if not error.any():  # as with weights de-quantised from the same format
                break
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better, step, best[0]),
            torch.where(better, minimum, best[1]),
            torch.where(better[..., None], codes, best[2]),
        )
    assert best is not None
    return best[0], best[1], best[2].to(torch.uint8).flatten(1)


def _candidates(groups: Tensor, form: Format) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield steps and minima to try, in half precision."""
    low, high = groups.amin(-1), groups.amax(-1)
    extreme = torch.where(high.abs() > low.abs(), high, low)
    if form == "int4":
        yield ((high - low) / 15).half(), low.half()  # Q4_1
        half = (extreme / -8).half()
        yield half, (half.float() * -8).half()  # Q4_0: the extreme is code 0
        for share in (0.95, 0.9, 0.85):  # clipping the ends can place the rest better
            middle, reach = (low + high) / 2, (high - low) / 2 * share
            yield (2 * reach / 15).half(), (middle - reach).half()
        return
    step = (extreme.abs() / 127).half()
    yield step, (step.float() * -128).half()  # Q8_0
    yield ((high - low) / 15).half(), low.half()  # Q4_1, which int8 can hold as well
    yield ((high - low) / 255).half(), low.half()


def _codes(groups: Tensor, step: Tensor, minimum: Tensor, most: int) -> Tensor:
    step, minimum = step.float()[..., None], minimum.float()[..., None]
    inverse = torch.where(step == 0, 0, 1 / step)
    return ((groups - minimum) * inverse).round().clamp(0, most)
