"""The readouts that exits own, as ``readouts.safetensors`` keeps them. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from offramp.errors import OfframpError
from offramp.files import write_tensors

Kind = Literal["affine", "head", "block"]

_NAME = re.compile(rf"([1-9][0-9]{{0,3}})\.({'|'.join(get_args(Kind))})\.([\w.]{{1,200}})")
_MATRICES = {"affine": {"weight": 2, "bias": 1}, "head": {"weight": 2}}


@dataclass(frozen=True)
class ExitReadout:
    """What the state at one exit passes before it becomes logits.

    ``affine``: ``weight [D, D]`` and ``bias [D]`` of a residual map in front of the last norm and
    head, ``state + state @ weight.T + bias`` (tuned lens, Belrose et al. 2023). ``head``: ``weight
    [V, D]`` in the place of the vocabulary head's (a bias, scales and soft caps stay the model's).
    ``block``: the parameters of a decoder layer of the kind of the model's last one, under the
    names of its ``state_dict()``, in front of the last norm and head (Balcony, Kangaroo).
    """

    kind: Kind
    tensors: dict[str, Tensor]


def read_readouts(path: Path) -> dict[int, ExitReadout]:
    """Return the readouts in a file, by depth. Whether they fit a model shows when it is opened.

    Raises:
        OfframpError: it cannot be read, or holds anything else; the first thing wrong is named.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise OfframpError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OfframpError(f"{path} is no safetensors file: {error}") from error
    found: dict[int, ExitReadout] = {}
    for full_name, tensor in tensors.items():
        match = _NAME.fullmatch(full_name)
        if match is None:
            raise OfframpError(
                f"{path} holds {full_name[:80]!r}, where readouts are named depth.kind.name, and "
                f"the kinds are {', '.join(get_args(Kind))}"
            )
        depth, kind, name = int(match[1]), cast("Kind", match[2]), match[3]
        if found.setdefault(depth, ExitReadout(kind, {})).kind != kind:
            raise OfframpError(f"{path} holds two readouts of exit {depth}")
        found[depth].tensors[name] = tensor
    for depth, readout in found.items():
        _check(readout, f"{path}: the readout of exit {depth}")
    return found


def write_readouts(path: Path, readouts: Mapping[int, ExitReadout]) -> None:
    """Write readouts by depth, whole or not at all.

    Raises:
        OfframpError: it cannot be written, or a readout is none.
    """
    for depth, readout in readouts.items():
        _check(readout, f"the readout of exit {depth}")
    tensors = {
        f"{depth}.{readout.kind}.{name}": tensor.detach().cpu().contiguous().clone()
        for depth, readout in readouts.items()
        for name, tensor in readout.tensors.items()
    }  # copies, for the format takes no two tensors of one memory
    write_tensors(path, tensors, {"format": "pt"})


def _check(readout: ExitReadout, what: str) -> None:
    """Refuse names, shapes and numbers that are wrong for any model."""
    dimensions = {name: tensor.dim() for name, tensor in readout.tensors.items()}
    expected = _MATRICES.get(readout.kind, dimensions)
    if dimensions != expected or not dimensions:
        raise OfframpError(
            f"{what} is no {readout.kind}: it holds {sorted(dimensions) or 'nothing'}"
        )
    for name, tensor in readout.tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise OfframpError(f"{what} holds a {name} that is not all finite numbers")
