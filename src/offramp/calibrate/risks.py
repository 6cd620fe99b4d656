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
    own: Callable[[Trace], Tensor] | None = None
    """Likewise on text that the policy wrote, whose every token it chose itself; None where nothing
    can be said of that."""

    @property
    def same_on_own_text(self) -> bool:
        """Return whether the policy's own text is judged just as the text that was certified."""
        return self.own is self.table


def _disagreement(trace: Trace) -> Tensor:
    return (trace.chosen != trace.chosen[:, -1:]).float()


def _increase(trace: Trace) -> Tensor:
    return trace.loss - trace.loss[:, -1:]


def _increase_on_own(trace: Trace) -> Tensor:
    """Return the last layer's loss less the chosen depth's, which wrote the text.

    A writer always thinks well of its text, so on either text it is the reader's loss that is
    taken, less the writer's.
    """
    return -_increase(trace)


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
        own=_disagreement,
    ),
    "divergence": Risk(
        "share of sequences with a token that is not the last layer's",
        _disagreement,
        _any,
        binary=True,
        own=_disagreement,
    ),
    "loss": Risk(
        "nats per token lost on the text, clipped to [0, 1] per sequence",
        _increase,
        _clipped,
        own=_increase_on_own,
    ),
    "error": Risk("share of sequences that are not the given text", _error, _any, binary=True),
}
"""By name. ``error`` is about texts that hold right answers; on the model's own text it is
``divergence``."""
