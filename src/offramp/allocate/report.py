"""What a score table says, budget by budget: the oracle beside its nulls, a router, fixed depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.allocate import oracle
from offramp.allocate.fit import price_of
from offramp.allocate.oracle import Knapsack, solve
from offramp.allocate.table import ScoreTable
from offramp.errors import UsageError
from offramp.router import choices

SAMPLES = 1000
SHUFFLES = 20
_TAIL = 0.025


@dataclass(frozen=True)
class Row:
    """One budget, in mean layers per token and text; scores are means over texts."""

    budget: float
    fixed: float
    """The best mix of depths that looks at no text."""
    oracle: float
    held_out: float | None
    """The oracle's choice made on one half of each text's tokens and scored on the other."""
    null: float | None
    """The same knapsack over runs of the full model that differ by seed alone."""
    permuted: tuple[float, float, float]
    """Oracle over scores shuffled per depth: mean, lowest and highest of the shuffles."""
    route: float | None
    """The router's choices, for texts it was not fitted on."""
    route_depth: float | None
    """What they cost."""
    recovered: float | None
    """Share of the way from fixed depth to the oracle that the router went."""
    recovered_interval: tuple[float, float] | None
    """95% bootstrap interval over texts of that share, the oracle's and the fixed score given."""
    histogram: tuple[int, ...]
    """Texts that the oracle gives to each way."""


@dataclass(frozen=True)
class Report:
    """What ``offramp oracle`` reports."""

    full: float
    """Mean score of the last way, the full model's."""
    constant: tuple[float, ...]
    """Mean score of each way alone."""
    weak: tuple[float, ...]
    """Mean over texts of the best score among the ways up to each one."""
    smallest: float
    """Least mean layers at which the oracle equals the full model."""
    smallest_interval: tuple[float, float]
    """95% bootstrap interval of it over texts."""
    smallest_held_out: float | None
    """The same where choices are made on the other half of the tokens; NaN: it never does."""
    gain: float
    """What the oracle gains on the full model if depth is free."""
    null_gain: float | None
    """What the same maximum gains over runs that differ by seed alone: the winner's curse."""
    held_out_gain: float | None
    rows: tuple[Row, ...]


def report(
    table: ScoreTable,
    budgets: Sequence[float],
    predicted: Tensor | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], object] = lambda share: None,
) -> Report:
    """Judge a table at these budgets.

    Args:
        table: the scores.
        budgets: mean layers per text; none cheaper than the cheapest way.
        predicted: ``[N, P]``: what a router says of texts it was not fitted on.
        seed: of shuffles and bootstraps.
        progress: told the share of the work done.

    Raises:
        UsageError: too few texts, scores that do not differ, or a budget out of range.
    """
    table.must_allocate()
    scores, costs = table.scores, table.costs
    check_budgets(budgets, costs)
    best = solve(scores, costs)
    full = scores[:, -1].mean().item()
    draw = torch.Generator().manual_seed(seed)
    shuffled = []
    for k in range(SHUFFLES):
        progress(k / (SHUFFLES + 2))
        one = solve(oracle.permuted(scores, draw), costs)
        shuffled.append([one.value(budget) for budget in budgets])
    halves = None if table.halves is None else [solve(half, costs) for half in table.halves]
    null = None if table.null is None else solve(table.null, costs)
    progress((SHUFFLES + 1) / (SHUFFLES + 2))
    samples = oracle.bootstrap_budgets(scores, costs, samples=SAMPLES, seed=seed)
    rows = tuple(
        _row(table, budget, best, null, values, halves, predicted, seed)
        for budget, values in zip(budgets, zip(*shuffled, strict=True), strict=True)
    )
    progress(1.0)
    return Report(
        full=full,
        constant=tuple(scores.mean(0).tolist()),
        weak=tuple(oracle.weak(scores).tolist()),
        smallest=best.smallest_budget(full),
        smallest_interval=_interval(samples),
        smallest_held_out=None if halves is None else _smallest_held_out(table, halves),
        gain=best.value(costs[-1].item()) - full,
        null_gain=None if table.null is None else _gain(table.null),
        held_out_gain=None if halves is None else _held_out_gain(table, halves),
        rows=rows,
    )


def default_budgets(costs: Tensor, most: int = 13) -> list[float]:
    """Return budgets from the cheapest way to the dearest: whole layers, at most so many."""
    low, high = math.ceil(costs[0].item()), math.floor(costs[-1].item())
    stride = max(math.ceil((high - low) / (most - 1)), 1)
    return [float(b) for b in range(high, low - 1, -stride)][::-1]


def check_budgets(budgets: Sequence[float], costs: Tensor) -> None:
    """Refuse budgets that no allocation of these ways has (UsageError)."""
    low, high = costs[0].item(), costs[-1].item()
    for budget in budgets:
        if not low <= budget <= high:
            raise UsageError(
                f"a budget of {budget:g} layers is outside {low:g} to {high:g}, what the ways take"
            )


def _row(
    table: ScoreTable,
    budget: float,
    best: Knapsack,
    null: Knapsack | None,
    shuffled: Sequence[float],
    halves: Sequence[Knapsack] | None,
    predicted: Tensor | None,
    seed: int,
) -> Row:
    scores, costs = table.scores, table.costs
    shares, fixed = oracle.fixed(scores, costs, budget)
    top = best.value(budget)
    row = Row(
        budget=budget,
        fixed=fixed,
        oracle=top,
        held_out=None if halves is None else _held_out(table, halves, budget),
        null=None if null is None else null.value(budget),
        permuted=(sum(shuffled) / len(shuffled), min(shuffled), max(shuffled)),
        route=None,
        route_depth=None,
        recovered=None,
        recovered_interval=None,
        histogram=tuple(best.allocation(budget).bincount(minlength=len(costs)).tolist()),
    )
    if predicted is None:
        return row
    chosen = choices(predicted, costs, price_of(predicted, costs, budget))
    routed = scores.gather(1, chosen[:, None])[:, 0]
    gains, gap = routed - scores @ shares, top - fixed
    share = (gains / gap).mean().item() if gap > 0 else None
    low, high = _interval(_means(gains, seed))
    return Row(
        **vars(row)
        | {
            "route": routed.mean().item(),
            "route_depth": costs[chosen].mean().item(),
            "recovered": share,
            "recovered_interval": (low / gap, high / gap) if gap > 0 else None,
        }
    )


def _held_out(table: ScoreTable, halves: Sequence[Knapsack], budget: float) -> float:
    """Return the mean score on each half of the choices made on the other."""
    assert table.halves is not None
    found: list[float] = [
        other.gather(1, one.allocation(budget)[:, None]).mean().item()
        for one, other in zip(halves, table.halves.flip(0), strict=True)
    ]
    return sum(found) / len(found)


def _held_out_gain(table: ScoreTable, halves: Sequence[Knapsack]) -> float:
    return _held_out(table, halves, table.costs[-1].item()) - _full_of_halves(table)


def _full_of_halves(table: ScoreTable) -> float:
    """Return the full model's mean score over both halves: what held-out choices compare with."""
    assert table.halves is not None
    return float(table.halves[:, :, -1].mean())


def _smallest_held_out(table: ScoreTable, halves: Sequence[Knapsack]) -> float:
    """Return the first of a hundred budgets at which choices from the other half are enough.

    Enough for the full model's mean on the half that scores; NaN where none is.
    """
    goal = _full_of_halves(table)
    low, high = table.costs[0].item(), table.costs[-1].item()
    for k in range(101):
        budget = low + (high - low) * k / 100
        if _held_out(table, halves, budget) >= goal:
            return budget
    return math.nan


def _gain(scores: Tensor) -> float:
    """Return what each text's best of these runs has above the mean run."""
    gain: float = (scores.amax(1).mean() - scores.mean()).item()
    return gain


def _means(values: Tensor, seed: int) -> Tensor:
    """Return bootstrap means of ``[N]`` values."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (SAMPLES, len(values)), generator=draw)
    return values[index].mean(1)


def _interval(samples: Tensor) -> tuple[float, float]:
    low, high = samples.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=samples.dtype)).tolist()
    return low, high
