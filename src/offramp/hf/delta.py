"""Keeps what tuning changed in a bit per weight and a scale per 64: an adapter that is dense.

What tuning adds is everywhere, small, and of no low rank, so its signs say most of it (BitDelta,
Liu et al. 2024). ``delta.safetensors`` holds, of each weight that changed, ``NAME.sign`` (uint8,
eight to a byte, the first the lowest bit) and ``NAME.scale`` (fp16), or ``NAME.added`` (fp16) where
it is no matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from offramp.errors import OfframpError
from offramp.files import write_tensors

DELTA = "delta.safetensors"
GROUP = 64
"""Neighbours in a row that share a scale."""
_BITS = 8


def rounded(change: Tensor) -> Tensor:
    """Return what is kept of a change ``[rows, columns]``: ``± scale``, in fp32.

    The scale is the mean size of its group, which is the nearest in squares.
    """
    return _spread(change >= 0, _scales(change))


def is_grouped(shape: torch.Size) -> bool:
    """Say whether the change of such a weight is kept in a bit per weight."""
    return len(shape) == 2 and shape[1] % GROUP == 0


def write_delta(folder: Path, base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    """Write what must be added to ``base`` to get nearly ``tuned``, whole or not at all.

    Args:
        folder: where ``delta.safetensors`` goes.
        base: the model to add to; fp32.
        tuned: the same model with other weights.

    Raises:
        OfframpError: they have not the same weights, or it cannot be written.
    """
    named, tensors = dict(base.named_parameters()), {}
    missing = named.keys() - {name for name, _ in tuned.named_parameters()}
    if missing:
        raise OfframpError(f"the tuned model has no {min(missing)}, and the base has")
    for name, weight in tuned.named_parameters():
        if name not in named or named[name].shape != weight.shape:
            raise OfframpError(f"the base has no {name} of {tuple(weight.shape)}")
        change = weight.detach().float() - named[name].detach().float()
        if not change.any():
            continue
        if is_grouped(change.shape):
            tensors[f"{name}.sign"] = _packed(change >= 0)
            tensors[f"{name}.scale"] = _scales(change)
        else:
            tensors[f"{name}.added"] = change.half()
    if not tensors:
        raise OfframpError("nothing was changed: the base does as it is")
    write_tensors(folder / DELTA, tensors, {"format": "pt"})


def with_delta(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model with a folder's changes added to its weights, in place.

    Args:
        model: the base, in fp32.
        folder: where the ``delta.safetensors`` of :func:`write_delta` is.

    Raises:
        OfframpError: it cannot be read, or does not fit the model; the first thing wrong is named.
    """
    named = dict(model.named_parameters())
    for name, change in _read(folder / DELTA, named):
        named[name].data += change
    return model


def _read(path: Path, named: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's name and its change, one after the other: together they are a model."""
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for key in sorted(keys):
                name, _, kind = key.rpartition(".")
                if name not in named or kind not in ("sign", "scale", "added"):
                    raise OfframpError(
                        f"{path} holds {key[:80]!r}, and the base has no such weight"
                    )
                if kind == "scale" and f"{name}.sign" in keys:
                    continue
                parts = [file.get_tensor(key)]
                parts += [file.get_tensor(f"{name}.scale")] if f"{name}.scale" in keys else []
                yield name, _change(path, name, kind, parts, named[name].shape)
    except OSError as error:
        raise OfframpError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OfframpError(f"{path} is no safetensors file: {error}") from error


def _change(path: Path, name: str, kind: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Return one weight's change, ``shape`` in fp32, or refuse parts that are none of it."""
    expected: list[tuple[tuple[int, ...], torch.dtype]] = []  # which nothing fits
    if kind == "added":
        expected = [(shape, torch.float16)]
    elif is_grouped(shape):
        rows, columns = shape
        expected = [
            ((rows, columns // _BITS), torch.uint8),
            ((rows, columns // GROUP), torch.float16),
        ]
    if [(part.shape, part.dtype) for part in parts] != expected:
        raise OfframpError(f"{path}: the change of {name} does not fit its {tuple(shape)} weights")
    if not parts[-1].isfinite().all():
        raise OfframpError(f"{path}: the change of {name} is not all finite numbers")
    return parts[0].float() if kind == "added" else _spread(_unpacked(parts[0]), parts[1])


def _scales(change: Tensor) -> Tensor:
    """Return the mean size of each group, ``[rows, groups]`` fp16."""
    groups: Tensor = change.abs().unflatten(1, (-1, GROUP)).mean(2)
    return groups.half()


def _spread(positive: Tensor, scales: Tensor) -> Tensor:
    """Return ``± scale`` for each weight, fp32."""
    signs: Tensor = positive.unflatten(1, (-1, GROUP)).float().mul_(2).sub_(1)
    return signs.mul_(scales.float()[..., None]).flatten(1)


def _packed(positive: Tensor) -> Tensor:
    """Return eight columns to a byte, ``[rows, columns / 8]`` uint8."""
    places = 2 ** torch.arange(_BITS, dtype=torch.uint8)
    bits: Tensor = positive.unflatten(1, (-1, _BITS)) * places
    return bits.sum(2, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    places = 2 ** torch.arange(_BITS, dtype=torch.uint8)
    return (packed[..., None] & places).ne(0).flatten(1)
