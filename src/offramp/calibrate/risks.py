"""What can be certified: the loss of a sequence, in [0, 1], from what each of its tokens lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from offramp.trace import Trace


@dataclass(frozen=True)
class Risk:
    """A loss per sequence; its mean over sequences is the risk."""

    says: str
    """What a mean of alpha means, for people."""
    table: Callable[[Trace], Tensor]
    """What choosing each token at each exit, or at the last layer, loses: ``[T, E + 1]`` fp32."""
    per_sequence: Callable[[Tensor, Tensor], Tensor]
    """``(sum over a sequence's tokens, number of tokens) -> loss in [0, 1]``, elementwise."""
    binary: bool = False
    """Whether a loss is 0 or 1: then the binomial bound is exact."""
    on_own_text: bool = False
    """Whether it means something on text that the policy wrote: it is against the last layer, not
    against the text, whose every token the policy chose."""


def _disagreement(trace: Trace) -> Tensor:
    return (trace.chosen != trace.chosen[:, -1:]).float()


def _increase(trace: Trace) -> Tensor:
    return trace.loss - trace.loss[:, -1:]


def _error(trace: Trace) -> Tensor:
    return (trace.chosen != trace.targets[:, None]).float()


def _share(total: Tensor, rows: Tensor) -> Tensor:
    return total / rows


def _any(total: Tensor, rows: Tensor) -> Tensor:
    return (total > 0).float()


def _clipped(total: Tensor, rows: Tensor) -> Tensor:
    return (total / rows).clamp(0, 1)


RISKS = {
    "disagreement": Risk(
        "share of a sequence's tokens that are not the last layer's",
        _disagreement,
        _share,
        on_own_text=True,
    ),
    "divergence": Risk(
        "share of sequences with a token that is not the last layer's",
        _disagreement,
        _any,
        binary=True,
        on_own_text=True,
    ),
    "loss": Risk(
        "nats per token lost on the text, clipped to [0, 1] per sequence", _increase, _clipped
    ),
    "error": Risk("share of sequences that are not the given text", _error, _any, binary=True),
}
"""By name. ``error`` is about texts that hold right answers; on the model's own text it is
``divergence``."""
