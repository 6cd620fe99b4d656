"""The oracle: the best any choice of one way per text could do, by budget. It peeks at the scores.

The multiple-choice knapsack of *Dynamic layer selection in decoder-only transformers* (Glavas et
al. 2024, section 4.3): one way for each text, the most score in total, at most so many layers per
text on average. Solved exactly by dynamic programming for all budgets at once; the paper splits the
texts into shards and their capacity with them, which can only lower the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import UsageError

_GRAIN = 100
"""Costs count to a hundredth of a layer."""
_MOST_CELLS = 2**30
_CLOSE = 1e-9
"""Scores this close are equal: sums of floats in another order."""
_CHUNK = 64


@dataclass(frozen=True)
class Knapsack:
    """Every budget's optimum for one table of N texts."""

    least: int
    """Cost of the cheapest way, in hundredths of a layer."""
    unit: int
    """What capacity is counted in, likewise."""
    extra: Tensor
    """``[P]`` int64: what each way costs above the cheapest, in units."""
    best: Tensor
    """``[C + 1]`` fp64: most total score with at most so many units above the cheapest."""
    taken: Tensor
    """``[N, C + 1]`` uint8: the way of text i where texts 0 to i share so many units."""

    @property
    def budgets(self) -> Tensor:
        """Return mean layers per text for every entry of ``best``, ``[C + 1]`` fp64."""
        units = torch.arange(len(self.best), dtype=torch.float64)
        return (self.least + units * self.unit / len(self.taken)) / _GRAIN

    def value(self, budget: float) -> float:
        """Return the oracle's mean score at this many mean layers per text."""
        return self.best[self._capacity(budget)].item() / len(self.taken)

    def allocation(self, budget: float) -> Tensor:
        """Return the way of each text at this budget, ``[N]`` int64."""
        left, ways = self._capacity(budget), []
        for row in self.taken.flip(0):
            ways.append(int(row[left]))
            left -= int(self.extra[ways[-1]])
        return torch.tensor(ways[::-1])

    def smallest_budget(self, target: float) -> float:
        """Return the least mean layers per text at which the mean score reaches ``target``.

        NaN where no budget does.
        """
        enough = self.best >= (target - _CLOSE) * len(self.taken)
        return self.budgets[int(enough.int().argmax())].item() if enough.any() else math.nan

    def _capacity(self, budget: float) -> int:
        room = (budget * _GRAIN - self.least) * len(self.taken) / self.unit
        if room < -_CLOSE:
            raise UsageError(
                f"no way is as cheap as {budget:g} layers: the cheapest takes "
                f"{self.least / _GRAIN:g}"
            )
        return math.floor(min(room + _CLOSE, len(self.best) - 1))


def solve(scores: Tensor, costs: Tensor) -> Knapsack:
    """Return the optimum of every budget.

    Of ways that are equally good the cheapest is taken.

    Args:
        scores: ``[N, P]``, higher = better.
        costs: ``[P]`` layers per token, ascending, to a hundredth.

    Raises:
        UsageError: so many texts and different costs that the table would not fit into memory.
    """
    whole = (costs * _GRAIN).round().long()
    extra = whole - whole[0]
    unit = math.gcd(*extra.tolist()) or 1
    extra //= unit
    capacity = len(scores) * int(extra[-1])
    if len(scores) * (capacity + 1) > _MOST_CELLS:
        raise UsageError(
            f"{len(scores)} texts at costs of {unit / _GRAIN:g} layers apart are too many for an "
            "exact answer: round the costs, or take fewer texts"
        )
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    taken = torch.zeros(len(scores), capacity + 1, dtype=torch.uint8)
    offsets = extra.tolist()
    for i, row in enumerate(scores.double().tolist()):
        earlier, best = best, best + row[0]
        for way, offset in enumerate(offsets[1:], 1):
            other = earlier[: capacity + 1 - offset] + row[way]
            better = other > best[offset:] + _CLOSE
            taken[i, offset:][better] = way
            best[offset:][better] = other[better]
    return Knapsack(int(whole[0]), unit, extra, best, taken)


def weak(scores: Tensor) -> Tensor:
    """Return ``[P]``: the mean over texts of the best score among the first p ways.

    The paper's "best of budgets up to b": each text's own best, whatever all of them cost.
    """
    return scores.double().cummax(1).values.mean(0)


def fixed(scores: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, float]:
    """Return shares ``[P]`` and mean score of the best mix of ways that looks at no text.

    At most two ways have a share: a point of the upper hull of (cost, mean score). It is what a
    coin per text gives, and what a choice per text has to beat.
    """
    means = scores.double().mean(0)
    shares, best = torch.zeros(len(costs), dtype=torch.float64), -math.inf
    for low in (costs <= budget + _CLOSE).nonzero()[:, 0].tolist():
        for high in range(low, len(costs)):
            rise = (costs[high] - costs[low]).item()
            share = min((budget - costs[low].item()) / rise, 1.0) if rise > 0 else 0.0
            mean = ((1 - share) * means[low] + share * means[high]).item()
            if mean > best + _CLOSE:
                best = mean
                shares.zero_()
                shares[low], shares[high] = 1 - share, share
                if low == high:
                    shares[low] = 1.0
    if best == -math.inf:
        raise UsageError(f"no way is as cheap as {budget:g} layers")
    return shares, best


def permuted(scores: Tensor, draw: torch.Generator) -> Tensor:
    """Return scores ``[N, P]`` with each way's shuffled over the texts: its marginal, no more."""
    columns = [column[torch.randperm(len(scores), generator=draw)] for column in scores.T]
    return torch.stack(columns, 1)


def steps(scores: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the steps worth taking from each text's cheapest way up its concave hull.

    Three tensors ``[K]``: text, gain in score, price in layers; best gain per layer first. Taken in
    this order they are the best split of any budget up to one step of one text (the linear
    relaxation), whatever the number of times each text is there.
    """
    rows = [
        (i, *step)
        for i, row in enumerate(scores.double().tolist())
        for step in _climb(row, costs.tolist())
    ]
    rows.sort(key=lambda row: -row[1] / row[2] if row[2] else -math.inf)
    texts = torch.tensor([row[0] for row in rows], dtype=torch.long)
    gains = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    prices = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    return texts, gains, prices


def _climb(row: list[float], costs: list[float]) -> Iterator[tuple[float, float]]:
    """Yield (gain, price) from hull point to hull point, as long as there is something to gain."""
    at = 0
    while True:
        ahead = [j for j in range(at + 1, len(row)) if row[j] > row[at] + _CLOSE]
        if not ahead:
            return
        at, before = (
            max(
                ahead,
                key=lambda j: (
                    (row[j] - row[at]) / (costs[j] - costs[at])
                    if costs[j] > costs[at]
                    else math.inf
                ),
            ),
            at,
        )
        yield row[at] - row[before], costs[at] - costs[before]


def bootstrap_budgets(
    scores: Tensor, costs: Tensor, *, samples: int = 1000, seed: int = 0
) -> Tensor:
    """Return the smallest sufficient budget of each bootstrap sample of texts, ``[samples]``.

    Sufficient is what reaches the last way's mean score in the same sample. Each is solved by the
    linear relaxation (:func:`steps`), which is off by less than one step of one text over N.
    """
    draw = torch.Generator().manual_seed(seed)
    texts, gains, prices = steps(scores, costs)
    count = len(scores)
    missing = (scores[:, -1] - scores[:, 0]).double()
    found = []
    for size in [_CHUNK] * (samples // _CHUNK) + [samples % _CHUNK]:
        drawn = torch.randint(count, (size, count), generator=draw)
        times = torch.zeros(size, count, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        found.append(_reach(times @ missing, times[:, texts] * gains, times[:, texts] * prices))
    return costs[0] + torch.cat(found) / count


def _reach(targets: Tensor, gains: Tensor, prices: Tensor) -> Tensor:
    """Return what each row pays until its gains reach its target, the last step in part, ``[B]``.

    No target: nothing.
    """
    if not gains.shape[1]:
        return torch.zeros_like(targets)
    reached, paid = gains.cumsum(1), prices.cumsum(1)
    enough = reached >= targets[:, None] - _CLOSE
    enough[:, -1] = True
    at = enough.int().argmax(1, keepdim=True)
    over = (reached.gather(1, at)[:, 0] - targets).clamp_min(0)
    gain, price = gains.gather(1, at)[:, 0], prices.gather(1, at)[:, 0]
    back = torch.where(gain > 0, (over / gain.clamp_min(1e-300)).clamp_max(1), 0) * price
    paid_then = paid.gather(1, at)[:, 0] - back
    return torch.where(targets <= _CLOSE, torch.zeros_like(targets), paid_then)
