"""What comes with offramp, by name: two models over the default one, and plans.

See docs/tuning.md for how they were made.
"""

from __future__ import annotations

from pathlib import Path

EXITS = "default-exits"
"""The default model as it is, with an exit that was taught to speak."""
NARROW = "e2e-16"
"""Sixteen of its layers, taught to say a list of attributes in a sentence (E2E)."""
REFINED = "default-int4"
"""A plan alone, for the default model itself in int4: all layers, and a refined head."""
NAMES = (EXITS, NARROW)
"""MODEL by these names, each with a plan of the name."""
PLANS = (*NAMES, REFINED)
"""``--plan`` by these."""
_PLAN = "plan.json"


def folder(name: str | None) -> Path | None:
    """Return where a model of this name comes with offramp; a local folder so called goes first."""
    if name not in NAMES or Path(name).exists():
        return None
    return Path(__file__).parent / name


def plan(name: str) -> Path:
    """Return the file of a plan that comes with offramp, else the path given."""
    if name not in PLANS or Path(name).exists():
        return Path(name)
    return Path(__file__).parent / name / _PLAN
