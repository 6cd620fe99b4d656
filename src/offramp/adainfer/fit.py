"""Fits a classifier to traces: what does an exit look like where it is right to leave?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from offramp.adainfer.chain import fit_chain
from offramp.adainfer.labels import joined, labels, table
from offramp.adainfer.linear import fit_linear
from offramp.classifier import Classifier, Facts, Kind, Label
from offramp.errors import UsageError
from offramp.policy import check_exits
from offramp.trace import Trace

FEATURES = ("margin", "max_prob")
"""AdaInfer's *gap* and *top prob*."""
RULE_BAR = 0.8
"""The gap from which AdaInfer's rule leaves."""
LEAST_TEXTS = 4

Fitted = Literal["svm", "logistic", "crf"]


def fit_classifier(
    traces: Trace | Sequence[Trace],
    kind: Kind = "svm",
    *,
    label: Label = "final",
    features: tuple[str, ...] = FEATURES,
    pooled: bool = True,
) -> Classifier:
    """Return a classifier fitted to all rows and exits of the traces. Deterministic.

    Features are standardised for fitting, and the weights then told for features as they are. The
    rule (``kind="rule"``: leave where p1 - p2 is 0.8 or more) is not fitted to anything.

    Args:
        traces: one, or several of the same model, exits and check: what they are of (one task or
            many) is what the classifier is for.
        kind: what is fitted; AdaInfer's by default.
        label: when it is right to leave (see :func:`offramp.adainfer.labels.labels`).
        features: names of signals, or ``depth``; those of the rule are its own.
        pooled: one classifier for all exits, as AdaInfer's; else one for each.

    Raises:
        UsageError: fewer than four texts; every row right at every exit, or none at any; features
            that never change, or that are not finite; traces that do not go together.
        OfframpError: the kind is fitted by scikit-learn, which is not installed.
    """
    trace = traces if isinstance(traces, Trace) else joined(traces)
    check_exits(trace.exits, trace.num_layers)  # of a short head it may have the last layer, too
    names = ("margin",) if kind == "rule" else features
    rows, right = table(trace, names), labels(trace, label)
    if kind == "rule":
        weights, biases, transitions = _rule(len(trace.exits))
    else:
        _check_data(trace, rows, right, label)
        weights, biases, transitions = _fitted(kind, rows, right, pooled=pooled)
    facts = Facts(
        kind=kind,
        label=label,
        features=names,
        exits=trace.exits,
        num_layers=trace.num_layers,
        fingerprint=trace.fingerprint,
        check=trace.check,
        pooled=pooled or kind == "rule",
        fitted_on=_summary(trace, right),
    )
    return Classifier(facts, weights, biases, transitions)


def _rule(exits: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.ones(exits, 1, dtype=torch.float64)
    return weights, torch.full_like(weights[:, 0], -RULE_BAR), weights.new_zeros(2, 2)


def _fitted(
    kind: Fitted, rows: Tensor, right: Tensor, *, pooled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights ``[E, F]``, biases ``[E]`` and transitions for the features as they are."""
    dims = (0, 1) if pooled else (0,)
    mean, spread = rows.mean(dims), rows.std(dims, unbiased=False)
    flat = spread <= 1e-9 * rows.abs().amax(dims)  # what never changes must have no weight
    spread = torch.where(flat, torch.inf, spread)
    inputs = (rows - mean) / spread
    weights, biases, transitions = _plane(kind, inputs, right, pooled=pooled)
    weights = weights / spread
    return weights, biases - (weights * mean).sum(-1), transitions


def _plane(
    kind: Fitted, inputs: Tensor, right: Tensor, *, pooled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    exits = inputs.shape[1]
    if kind == "crf":
        return fit_chain(inputs, right, pooled=pooled)
    if pooled:
        found = [fit_linear(kind, inputs.flatten(0, 1), right.flatten())] * exits
    else:
        found = [fit_linear(kind, inputs[:, k], right[:, k]) for k in range(exits)]
    weights, biases = zip(*found, strict=True)
    return torch.stack(weights), torch.stack(biases), inputs.new_zeros(2, 2)


def _check_data(trace: Trace, rows: Tensor, right: Tensor, label: Label) -> None:
    """Refuse what teaches nothing."""
    if len(trace.lengths) < LEAST_TEXTS:
        raise UsageError(
            f"{len(trace.lengths)} texts are too few to fit a classifier: trace {LEAST_TEXTS} or "
            "more, better hundreds"
        )
    if right.all() or not right.any():
        share = "every" if right.all() else "no"
        raise UsageError(
            f"{share} row is right at {'every' if right.all() else 'any'} exit (label {label}): "
            "there is nothing to tell apart; trace other texts or other exits"
        )
    if bool((rows == rows[:1, :1]).all()):
        raise UsageError("the features are the same in every row: there is nothing to learn from")


def _summary(trace: Trace, right: Tensor) -> dict[str, Any]:
    return {
        "texts": len(trace.lengths),
        "tokens": len(trace.chosen),
        "right": right.double().mean(0).tolist(),
    }
