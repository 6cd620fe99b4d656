"""What comes with offramp, by name: two models over the default one, and a certified plan for each.

See docs/tuning.md for how they were made.
"""

from __future__ import annotations

from pathlib import Path

EXITS = "default-exits"
"""The default model as it is, with an exit that was taught to speak."""
NARROW = "e2e-16"
"""Sixteen of its layers, taught to say a list of attributes in a sentence (E2E)."""
NAMES = (EXITS, NARROW)
"""MODEL and ``--plan`` by these names."""
_PLAN = "plan.json"


def folder(name: str | None) -> Path | None:
    """Return where a model of this name comes with offramp; a local folder so called goes first."""
    if name not in NAMES or Path(name).exists():
        return None
    return Path(__file__).parent / name


def plan(name: str) -> Path:
    """Return the file of a plan: that of a model by its name, else the path given."""
    found = folder(name)
    return Path(name) if found is None else found / _PLAN
