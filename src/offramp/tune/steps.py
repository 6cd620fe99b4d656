"""Which examples each step of a run trains on: a function of data, settings and seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from offramp.tune.data import Example
from offramp.tune.packing import Pack, pack
from offramp.tune.settings import Settings


def plan_steps(
    examples: Sequence[Example], settings: Settings, *, alone: bool = False
) -> list[list[Pack]]:
    """Return the packed rows of every optimiser step of the run.

    Args:
        examples: what to train on.
        settings: row length, rows of a step, epochs or tokens, and seed.
        alone: one example a row.
    """
    steps: list[list[Pack]] = []
    seen = 0
    for epoch in itertools.count() if settings.tokens else range(settings.epochs):
        rows = pack(examples, settings.length, settings.seed, epoch, alone=alone)
        for start in range(0, len(rows), settings.rows):
            step = rows[start : start + settings.rows]
            steps.append(step)
            seen += tokens(step, examples)
            if settings.tokens and seen >= settings.tokens:
                return steps
    return steps


def tokens(step: Sequence[Pack], examples: Sequence[Example]) -> int:
    """Return how many tokens a step sees, padding not counted."""
    return sum(len(examples[index].ids) for members in step for index in members)


def labels(step: Sequence[Pack], examples: Sequence[Example]) -> int:
    """Return how many tokens of a step are learnt."""
    return sum(
        len(examples[index].ids) - examples[index].first for members in step for index in members
    )


def parts(step: list[Pack], rank: int, ranks: int, rows_at_once: int) -> Iterator[list[Pack]]:
    """Yield what one of ``ranks`` processes runs of a step, ``rows_at_once`` rows at a time.

    Every process yields as often as the others, the last times perhaps nothing.
    """
    mine = step[rank::ranks]
    most = -(-len(step) // ranks)
    for start in range(0, most, rows_at_once):
        yield mine[start : start + rows_at_once]
