"""The linear classifiers, fitted by scikit-learn; only numbers leave here, never its objects."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from offramp.errors import OfframpError

Linear = Literal["svm", "logistic"]


def estimator(kind: Linear) -> Any:
    """Return scikit-learn's estimator, not fitted, with its own default penalty (``C = 1``).

    Raises:
        OfframpError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise OfframpError(
            "fitting this classifier takes scikit-learn: pip install 'offramp[fit]'"
        ) from error
    if kind == "svm":
        return LinearSVC(dual=False, tol=1e-8, max_iter=10_000)
    return LogisticRegression(tol=1e-8, max_iter=10_000)


def fit_linear(kind: Linear, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights ``[F]`` and bias of rows ``[N, F]`` and labels ``[N]`` bool, all fp64.

    Where all labels are the same there is no plane: the bias alone then says so, as the log-odds
    that Platt (1999) smooths.
    """
    right = int(labels.sum())
    if right in (0, len(labels)):
        odds = torch.tensor((right + 1) / (len(labels) - right + 1), dtype=torch.float64)
        return torch.zeros(rows.shape[1], dtype=torch.float64), odds.log()
    fitted = estimator(kind).fit(rows.numpy(), labels.numpy())
    return torch.from_numpy(fitted.coef_[0]), torch.tensor(fitted.intercept_[0])
