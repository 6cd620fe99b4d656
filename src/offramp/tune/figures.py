"""Figures of a model on every text that it is judged on; those of the untouched one are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from offramp.files import write_text
from offramp.tune.data import Example
from offramp.tune.gradients import arithmetic
from offramp.tune.network import Net
from offramp.tune.place import BEFORE
from offramp.tune.report import judge
from offramp.tune.settings import Settings
from offramp.tune.state import Run

Figures = dict[str, list[dict[str, Any]]]
"""Rows of :func:`offramp.tune.report.judge`, by the name of the text judged on."""


def judge_all(
    net: Net, judged: Mapping[str, Sequence[Example]], settings: Settings, accelerator: Accelerator
) -> Figures:
    """Return the figures of a net on all texts."""
    with arithmetic(settings, accelerator.device):
        return {
            name: judge(net, examples, settings.length, accelerator.device)
            for name, examples in judged.items()
        }


def digest(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of examples, in their order."""
    made = hashlib.sha256()
    for example in examples:
        made.update(json.dumps([example.first, example.ids]).encode())
    return made.hexdigest()


def figures_before(
    out: Path,
    run: Run,
    judged: Mapping[str, Sequence[Example]],
    measure: Callable[[], Figures],
    *,
    main: bool,
) -> Figures:
    """Return the figures of the untouched model: measured once, kept for when a run goes on.

    Args:
        out: the run's folder.
        run: what it is.
        judged: the texts.
        measure: makes them.
        main: whether this process writes.

    Raises:
        OfframpError: they cannot be written.
    """
    path = out / BEFORE
    asked = {"run": asdict(run), "judged": {name: digest(text) for name, text in judged.items()}}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            figures: Figures = kept["figures"]
            return figures
    except (OSError, ValueError, KeyError, TypeError):
        pass
    figures = measure()
    if main:
        write_text(path, json.dumps({"key": key, "figures": figures}))
    return figures
