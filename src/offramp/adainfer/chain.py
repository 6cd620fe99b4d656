"""A linear-chain conditional random field of two labels, fitted by its exact likelihood.

Lafferty, McCallum and Pereira (2001). The chain of a token is its exits, from shallow to deep. The
parameters and the penalty are CRFsuite's (``c1 = 0``), which the tests hold it against; its own
tools store weights with six decimals, so that what was fitted could not be taken over exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from offramp.classifier import carried

_STEPS = 500


@torch.enable_grad()
def fit_chain(
    rows: Tensor, labels: Tensor, *, pooled: bool, l2: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights ``[E, F]``, biases ``[E]`` and transitions ``[2, 2]``; deterministic.

    Args:
        rows: ``[N, E, F]`` fp64, each feature of about unit size.
        labels: ``[N, E]`` bool.
        pooled: whether all exits share their weights and bias.
        l2: weight of the squared parameters beside the summed negative log-likelihood. Weights for
            "stop" are those for "go on" turned round, so half of their squares counts.
    """
    count, exits, width = rows.shape
    state = torch.zeros(1 if pooled else exits, width + 1, dtype=rows.dtype, requires_grad=True)
    transitions = torch.zeros(2, 2, dtype=rows.dtype, requires_grad=True)
    inputs = torch.cat((rows, torch.ones_like(rows[..., :1])), -1)
    optimiser = torch.optim.LBFGS(
        [state, transitions],
        max_iter=_STEPS,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        likelihood = log_likelihood((inputs * state).sum(-1), labels, transitions)
        penalty = l2 * (state.square().sum() / 2 + transitions.square().sum())
        total: Tensor = (penalty - likelihood.sum()) / count
        total.backward()
        return total

    optimiser.step(loss)
    spread = state.detach().expand(exits, width + 1)
    return spread[:, :-1].clone(), spread[:, -1].clone(), transitions.detach()


def log_likelihood(scores: Tensor, labels: Tensor, transitions: Tensor) -> Tensor:
    """Return ``[N]``: the log-probability of each chain's labels ``[N, E]``.

    ``scores [N, E]`` are those of "stop" less those of "go on". The normaliser is the forward
    algorithm's: with ``odds`` the log-odds over the exits so far, the total mass grows at each exit
    by the mass of "go on" and by ``1 + exp(odds)``.
    """
    chosen = labels.to(scores.dtype)
    path = (scores * chosen).sum(1)
    path = path + transitions[labels[:, :-1].long(), labels[:, 1:].long()].sum(1)
    odds, total = scores[:, 0], torch.zeros_like(scores[:, 0])  # log mass of "go on"
    for k in range(1, scores.shape[1]):
        total = total + torch.logaddexp(odds + transitions[1, 0], transitions[0, 0])
        odds = scores[:, k] + carried(odds, transitions)
    return path - total - softplus(odds)
