"""The state of a run on disk: written beside and renamed, so that a kill costs a few steps.

Trained weights and the optimiser's averages as safetensors, the rest as JSON. Nothing random is
stored: what a step draws follows from its number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from offramp.errors import OfframpError
from offramp.files import write_tensors, write_text

_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FOLDER, _FACTS, _WEIGHTS, _OPTIMISER = (
    "state",
    "state.json",
    "weights.safetensors",
    "optimiser.safetensors",
)


@dataclass(frozen=True)
class Run:
    """What a run is, so that only the same one goes on from its state."""

    settings: Mapping[str, Any]
    data: Mapping[str, str]
    """SHA-256 by file name."""
    model: str
    """Fingerprint of the model that tuning starts from."""
    examples: str = ""
    """Of the examples themselves, which the same files may yield others of."""
    teacher: str | None = None
    """Fingerprint of another model that is distilled."""

    def must_equal(self, other: Run, folder: Path) -> None:
        """Refuse to go on from another run's state.

        Raises:
            OfframpError: model, data or settings differ; the first difference is named.
        """
        again = f"name another --out, or remove {folder}"
        if self.model != other.model:
            raise OfframpError(
                f"{folder} holds a run that began from another model (fingerprint {other.model}, "
                f"not {self.model}); {again}"
            )
        if self.teacher != other.teacher:
            raise OfframpError(
                f"{folder} holds a run with another teacher (fingerprint {other.teacher}, not "
                f"{self.teacher}); {again}"
            )
        changed = [n for n in {*self.data, *other.data} if self.data.get(n) != other.data.get(n)]
        if changed:
            raise OfframpError(
                f"{folder} holds a run on other data: {min(changed)} has changed since; {again}"
            )
        if self.examples != other.examples:
            raise OfframpError(
                f"{folder} holds a run on other rows of the same data (--limit, --skip-bad or the "
                f"tokenizer differ); {again}"
            )
        for name in sorted({*self.settings, *other.settings}):
            ours, theirs = self.settings.get(name), other.settings.get(name)
            if ours != theirs:
                raise OfframpError(
                    f"{folder} holds a run with another {name} ({theirs}, not {ours}); {again}"
                )


def save_state(
    folder: Path, run: Run, step: int, trained: dict[str, nn.Parameter], optimiser: Any, main: bool
) -> None:
    """Write the state after ``step`` steps in place of the one before.

    Args:
        folder: the run's output folder.
        run: what it is.
        step: optimiser steps done.
        trained: what is trained, by name.
        optimiser: an AdamW over these.
        main: whether this process writes; the others hold the same.

    Raises:
        OfframpError: it cannot be written; the state before is still there.
    """
    if not main:
        return
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
    states = {name: optimiser.state.get(p, {}) for name, p in trained.items()}
    moments = {
        f"{moment}.{name}": state[moment].cpu().contiguous()
        for name, state in states.items()
        if state
        for moment in _MOMENTS
    }
    # Only what has had a gradient has averages, and a count of its own.
    counts = {name: int(state["step"]) for name, state in states.items() if state}
    place, beside = folder / _FOLDER, folder / f".{_FOLDER}.part"
    facts = {
        "format": _FORMAT,
        "step": step,
        "model": run.model,
        "data": dict(run.data),
        "examples": run.examples,
        "teacher": run.teacher,
        "settings": dict(run.settings),
        "counts": counts,
    }
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_tensors(beside / _WEIGHTS, weights, {})
        write_tensors(beside / _OPTIMISER, moments, {})
        write_text(beside / _FACTS, json.dumps(facts, indent=1))
        _swap(beside, place)
    except OSError as error:
        raise OfframpError(
            f"the state of the run cannot be written to {folder}: {error.strerror or error}; the "
            "last one written is still there, and the same command goes on from it"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    """Put a folder in the place of another; killed in between, ``find`` sees the old one."""
    old = place.with_name(f".{_FOLDER}.old")
    if place.exists():  # else the old one, left by a kill in here, is all there is
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def find_state(folder: Path) -> Path | None:
    """Return the folder of the last whole state of a run, or None where there is none."""
    for place in (folder / _FOLDER, folder / f".{_FOLDER}.old"):
        if (place / _FACTS).is_file():
            return place
    return None


def must_continue(folder: Path, run: Run) -> None:
    """Refuse a folder that holds the state of another run, before anything is computed.

    Raises:
        OfframpError: it does, or the state is broken.
    """
    place = find_state(folder)
    try:
        if place is not None:
            _facts(place, run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OfframpError(f"{place} is no state of a run: {error}") from error


def _facts(place: Path, run: Run) -> dict[str, Any]:
    """Return what a state says of itself, which must be the state of this run."""
    facts: dict[str, Any] = json.loads((place / _FACTS).read_text(encoding="utf-8"))
    if facts["format"] != _FORMAT:
        raise OfframpError(f"{place} has format {facts['format']}, not {_FORMAT}")
    written = Run(
        facts["settings"], facts["data"], facts["model"], facts["examples"], facts.get("teacher")
    )
    run.must_equal(written, place.parent)
    return facts


def load_state(place: Path, run: Run, trained: dict[str, nn.Parameter], optimiser: Any) -> int:
    """Put a run's weights and averages back and return how many steps were done.

    Raises:
        OfframpError: it is of another run, broken, or does not match what is trained.
    """
    try:
        facts = _facts(place, run)
        weights, moments = load_file(place / _WEIGHTS), load_file(place / _OPTIMISER)
        step, counts = int(facts["step"]), dict(facts["counts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise OfframpError(f"{place} is no state of a run: {error}") from error
    _must_match(place, trained, weights, moments, counts)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            if name in counts:
                state = {m: moments[f"{m}.{name}"].to(parameter, copy=True) for m in _MOMENTS}
                count = torch.tensor(float(counts[name]))
                optimiser.state[parameter] = {"step": count, **state}
    return step


def _must_match(
    place: Path,
    trained: dict[str, nn.Parameter],
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    counts: dict[str, int],
) -> None:
    wanted = {name: parameter.shape for name, parameter in trained.items()}
    averages = {f"{m}.{n}": wanted[n] for n in counts if n in wanted for m in _MOMENTS}
    if {n: t.shape for n, t in weights.items()} != wanted or not {*counts} <= {*wanted}:
        raise OfframpError(f"the weights in {place} are not those that this recipe trains")
    if {n: t.shape for n, t in moments.items()} != averages:
        raise OfframpError(f"the optimiser's state in {place} does not match the weights beside it")


def clear_state(folder: Path) -> None:
    """Remove what only a run that is not finished needs."""
    for name in (_FOLDER, f".{_FOLDER}.old", f".{_FOLDER}.part"):
        shutil.rmtree(folder / name, ignore_errors=True)
