"""Fits routers on score tables: ridge regression in closed form, judged on texts left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.allocate.table import ScoreTable
from offramp.errors import UsageError
from offramp.router import CONFIDENCES, RouterWeights, choices

LEAST_TEXTS = 50
"""Fewer texts than this teach a router nothing that it could be judged by."""
FOLDS = 5

_STRENGTHS = tuple(10.0**k for k in range(-2, 6))
"""Ridge strengths tried; the last leaves every text the same scores, and no choice."""
_EPSILON = 1e-6


@dataclass(frozen=True)
class _Line:
    """A fitted linear map: ``[F, P]`` weights and ``[P]`` biases, fp64."""

    weights: Tensor
    biases: Tensor
    strength: float

    def __call__(self, features: Tensor) -> Tensor:
        return features.double() @ self.weights + self.biases


def fit_router(table: ScoreTable, *, seed: int = 0) -> tuple[RouterWeights, Tensor]:
    """Return a router fitted on all texts, and what routers fitted without a text say of it.

    Each way's score, less the text's mean over the ways, is predicted by one ridge regression;
    its strength is the one with the least leave-one-out error.

    Args:
        table: scores with features.
        seed: which texts are left out together.

    Returns:
        The router, and ``[N, P]`` fp64: predictions for each text out of the folds without it. What
        a router is worth is judged on these alone.

    Raises:
        UsageError: no features, too few texts, or scores that do not differ.
    """
    table.must_allocate()
    if table.features is None:
        raise UsageError("the table has no features of its prompts to choose by; make it anew")
    if len(table.scores) < LEAST_TEXTS:
        raise UsageError(
            f"{len(table.scores)} texts are too few for a router: {LEAST_TEXTS} or more are needed"
        )
    looks = len(table.exits)
    line = _fit(table.features, table.scores, looks)
    crossed = _crossed(table.features, table.scores, looks, seed)
    router = RouterWeights(
        exits=table.exits,
        num_layers=table.model.num_layers,
        fingerprint=table.model.fingerprint,
        runs=tuple(run.model_dump_json() for run in table.runs),
        costs=table.costs,
        weights=line.weights.T.float().contiguous(),
        biases=line.biases.float(),
        fitted_on={
            "texts": len(table.scores),
            "score": table.score,
            "teacher_forced": table.teacher_forced,
            "strength": line.strength,
            "explained": explained(crossed, table.scores),
        },
    )
    return router, crossed


def explained(predicted: Tensor, scores: Tensor) -> float:
    """Return the share of the ways' differences within texts that is predicted: R squared.

    What is to be beaten is each way's mean over all texts; 0 or less is nothing learnt.
    """
    centred = scores - scores.mean(1, keepdim=True)
    left = (centred - (predicted - predicted.mean(1, keepdim=True))).square().sum()
    spread = (centred - centred.mean(0)).square().sum()
    return (1 - left / spread).item() if spread > 0 else 0.0


def price_of(predicted: Tensor, costs: Tensor, budget: float) -> float:
    """Return the least price per layer at which choices cost no more than this on average.

    Looks at predictions only, never at scores. By bisection: what is spent falls with the price.
    """
    gaps = (costs[1:] - costs[:-1]).clamp_min(_EPSILON).min()
    low, high = 0.0, ((predicted.amax() - predicted.amin()) / gaps).item() + _EPSILON
    if _spent(predicted, costs, low) <= budget:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if _spent(predicted, costs, middle) <= budget:
            high = middle
        else:
            low = middle
    return high


def _spent(predicted: Tensor, costs: Tensor, price: float) -> float:
    return costs[choices(predicted, costs, price)].mean().item()


def _crossed(features: Tensor, scores: Tensor, looks: int, seed: int) -> Tensor:
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    predicted = torch.empty_like(scores)
    for fold in order.chunk(FOLDS):
        rest = torch.ones(len(scores), dtype=torch.bool)
        rest[fold] = False
        predicted[fold] = _fit(features[rest], scores[rest], looks)(features[fold])
    return predicted


def _fit(features: Tensor, scores: Tensor, looks: int) -> _Line:
    """Return the ridge regression of least leave-one-out error (Allen's PRESS, closed form)."""
    inputs = features.double()
    mean = inputs.mean(0)
    scale = inputs.std(0, unbiased=False).clamp_min(_EPSILON)
    # The state's hundreds of widths together weigh as much as one number about the first token.
    plain = 1 + len(CONFIDENCES) * looks
    scale[plain:] *= max(inputs.shape[1] - plain, 1) ** 0.5
    targets = scores - scores.mean(1, keepdim=True)
    middle = targets.mean(0)
    left, sizes, right = torch.linalg.svd((inputs - mean) / scale, full_matrices=False)
    turned = left.T @ (targets - middle)
    best: tuple[float, float] | None = None
    for strength in _STRENGTHS:
        kept = sizes.square() / (sizes.square() + strength)
        residual = targets - middle - left @ (kept[:, None] * turned)
        leverage = left.square() @ kept + 1 / len(inputs)
        error = (residual / (1 - leverage).clamp_min(_EPSILON)[:, None]).square().mean().item()
        if best is None or error < best[0]:
            best = error, strength
    assert best is not None
    weights = right.T @ ((sizes / (sizes.square() + best[1]))[:, None] * turned) / scale[:, None]
    return _Line(weights, middle - mean @ weights, best[1])
