"""What a text of E2E repeats of its meaning; the other scores of narrow tasks are the library's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from offramp.evaluate.overlap import words

LITERAL = ("name", "type", "food", "area", "near")
"""Attributes whose values a good text repeats word by word; prices and ratings are paraphrased."""


def coverage(text: str, meaning: Iterable[tuple[str, str]]) -> float:
    """Return the share of the meaning's literal values that the text holds as whole words."""
    own = f" {' '.join(words(text))} "
    wanted = [" ".join(words(value)) for key, value in meaning if key in LITERAL]
    return statistics.fmean(f" {value} " in own for value in wanted) if wanted else 1.0
