"""What comes with offramp, by name: exits of the default model, and a certified plan for them."""

from __future__ import annotations

from pathlib import Path

EXITS = "default-exits"
"""MODEL and ``--plan`` by this name: see docs/tuning.md for how they were made."""
_PLAN = "plan.json"


def folder(name: str | None) -> Path | None:
    """Return where a model of this name comes with offramp; a local folder so called goes first."""
    if name != EXITS or Path(name).exists():
        return None
    return Path(__file__).parent / EXITS


def plan(name: str) -> Path:
    """Return the file of a plan: that of the exits by their name, else the path given."""
    found = folder(name)
    return Path(name) if found is None else found / _PLAN
