"""The registry of recipes: one file, two functions each, found by its file's name.

``trainable(net)`` switches on what is trained; ``loss(net, batch, moment)`` is what is minimised,
as sums over the labelled rows of the batch. Everything else is the loop's.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from offramp.errors import UsageError
from offramp.tune.losses import Losses
from offramp.tune.network import Net
from offramp.tune.packing import Batch
from offramp.tune.settings import Settings


@dataclass(frozen=True, eq=False)
class Moment:
    """Where in the run a loss is asked for."""

    step: int
    """Optimiser steps done."""
    steps: int
    """Optimiser steps of the whole run."""
    settings: Settings
    generator: torch.Generator
    """Seeded by run, step and part of the batch: a resumed run draws the same numbers."""
    shared: torch.Generator
    """Seeded by run and step alone: all processes and parts of a batch draw the same numbers."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on which loss."""

    trainable: Callable[[Net], None]
    loss: Callable[[Net, Batch, Moment], Losses]


@cache
def registry() -> dict[str, Recipe]:
    """Return every recipe by name: the files of this folder."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        if not entry.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{entry.name}")
            found[entry.name] = Recipe(module.trainable, module.loss)
    return found


def find(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        UsageError: no such recipe.
    """
    recipes = registry()
    if name not in recipes:
        # ``sorted`` is a recipe here, and hides the function; pkgutil yields names in order.
        raise UsageError(f"unknown recipe {name!r}; there are {', '.join(recipes)}")
    return recipes[name]
