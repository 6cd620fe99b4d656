"""Gates: leave by the hidden state alone, with no vocabulary head; fitted on a trace.

One logistic regression per exit (as CALM's learnt exit classifier, section 3.4): the probability
that the exit's choice is the last layer's. A gate is ``D`` products per row where a full check is
``D`` times the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from offramp.backbone import Backbone
from offramp.errors import OfframpError, UsageError
from offramp.files import digest_of, write_tensors
from offramp.policy import check_exits
from offramp.probe import Probe
from offramp.trace import Trace
from offramp.watch import Bars

_FORMAT = 2
_KEY, _DIGEST = "offramp_gate", "sha256"
_MOST_BYTES = 2**28
_EPSILON = 1e-6


@dataclass(frozen=True)
class GateWeights:
    """What gates have learnt, exit by exit, and of which model."""

    exits: tuple[int, ...]
    num_layers: int
    fingerprint: str
    weights: Tensor
    """``[E, D]`` fp32, on states of root mean square 1."""
    biases: Tensor
    """``[E]`` fp32."""
    fitted_on: Mapping[str, Any]
    """How much text, and how well each gate judges it."""

    def score(self, hidden: Tensor, depth: int) -> Tensor:
        """Return the probability, ``[S]``, that states ``[S, D]`` after ``depth`` may leave."""
        row = self.exits.index(depth)
        weights, bias = self.weights[row].to(hidden.device), self.biases[row].to(hidden.device)
        return torch.sigmoid(normed(hidden) @ weights + bias)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse another model than the one they were fitted on.

        Raises:
            UsageError: its fingerprint or its width differs.
        """
        width = self.weights.shape[1]
        if (self.fingerprint, width) != (backbone.fingerprint, backbone.shape.hidden_size):
            raise UsageError(
                f"these gates were fitted on a model of {self.num_layers} layers and fingerprint "
                f"{self.fingerprint}, not on this one (fingerprint {backbone.fingerprint})"
            )

    @cached_property
    def facts(self) -> str:
        """Return what a file says of them, as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "exits": self.exits,
                "num_layers": self.num_layers,
                "fingerprint": self.fingerprint,
                "fitted_on": self.fitted_on,
            }
        )

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of everything they are, by which a changed file is known."""
        return digest_of(self.facts, (self.weights, self.biases))

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all, its facts as JSON in the header."""
        tensors = {"weights": self.weights.contiguous(), "biases": self.biases.contiguous()}
        write_tensors(path, tensors, {_KEY: self.facts, _DIGEST: self.digest})


@dataclass(frozen=True, eq=False)
class Gate:
    """The policy: leave at the first exit whose gate gives the state this probability."""

    weights: GateWeights
    thresholds: tuple[tuple[int, float], ...]
    """(depth, lowest probability that leaves), ascending by depth."""

    def __post_init__(self) -> None:
        for depth, value in self.thresholds:
            if depth not in self.weights.exits:
                raise UsageError(
                    f"there is no gate for exit {depth}, only for {list(self.weights.exits)}"
                )
            if not (0 <= value <= 1 or value == math.inf):
                raise UsageError(
                    f"threshold {value} at exit {depth} is not in the range of a gate, 0 to 1"
                )

    @property
    def exits(self) -> tuple[int, ...]:
        """Return the depths that have a threshold."""
        return tuple(depth for depth, _ in self.thresholds)

    @cached_property
    def bars(self) -> Bars:
        """Return the thresholds, and the gates of their exits."""
        rows = [self.weights.exits.index(depth) for depth in self.exits]
        gates = torch.cat((self.weights.weights, self.weights.biases[:, None]), 1)[rows]
        return Bars("gate", self.thresholds, gates)

    def leave(self, probe: Probe) -> Tensor:
        """Return where the gate of this depth opens."""
        if probe.hidden is None:
            raise UsageError(
                "a gate looks at hidden states, which the trace did not keep; record it with "
                "keep_hidden=True"
            )
        score = self.weights.score(probe.hidden, probe.depth)
        return score >= dict(self.thresholds)[probe.depth]


def load_gate(path: Path, digest: str | None = None) -> GateWeights:
    """Return the gates in a file.

    Args:
        path: the file.
        digest: that of the gates, where a plan has noted it.

    Raises:
        OfframpError: it cannot be read, is no file of gates, its parts do not go together, it was
            changed since it was written, or it is not the one that the plan was made with.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            facts = json.loads(said[_KEY])
            weights, biases = file.get_tensor("weights"), file.get_tensor("biases")
        if facts["format"] != _FORMAT:
            raise OfframpError(f"{path} holds gates of format {facts['format']}, not {_FORMAT}")
        gates = GateWeights(
            exits=tuple(facts["exits"]),
            num_layers=facts["num_layers"],
            fingerprint=facts["fingerprint"],
            weights=weights,
            biases=biases,
            fitted_on=facts["fitted_on"],
        )
        _check_parts(gates)
    except OSError as error:
        raise OfframpError(f"cannot read the gates {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise OfframpError(f"{path} is no file of offramp gates") from error
    if gates.digest != said.get(_DIGEST):
        raise OfframpError(
            f"{path} was changed since it was written: its digest is not that of its content; fit "
            "the gates again"
        )
    if digest not in (None, gates.digest):
        raise OfframpError(
            f"{path} does not hold the gates this plan was made with, so its certificate says "
            "nothing of them; calibrate again"
        )
    return gates


def _check_parts(gates: GateWeights) -> None:
    """Refuse what does not go together; the caller says of which file."""
    exits, count = gates.exits, len(gates.exits)
    tensors = (gates.weights, gates.biases)
    good = (
        all(type(depth) is int and 1 <= depth < gates.num_layers for depth in exits)
        and all(a < b for a, b in pairwise(exits))
        and gates.weights.dim() == 2
        and (len(gates.weights), *gates.biases.shape) == (count, count)
        and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors)
    )
    if not good:
        raise ValueError("parts do not go together")


def fit_gate(trace: Trace, *, l2: float = 0.3) -> GateWeights:
    """Return a gate for each exit of the trace: does the state here say what the last layer will?

    Deterministic: logistic regression on standardised widths by L-BFGS. Targets are smoothed as
    Platt (1999) does it, so that exits that are always right, or never, have a gate too.

    Args:
        trace: recorded with ``keep_hidden=True``; its rows are what the gates learn from.
        l2: weight of the squared coefficients beside the mean loss; the default suits a few
            hundred tokens.

    Raises:
        UsageError: the trace kept no hidden states or has no exits, or ``l2`` is not positive.
    """
    if trace.hidden is None:
        raise UsageError(
            "gates are fitted on hidden states, which this trace did not keep; record it with "
            "keep_hidden=True"
        )
    if not trace.exits:
        raise UsageError("the trace has no exit to fit a gate for")
    check_exits(trace.exits, trace.num_layers)  # of a short head it may have the last layer, too
    if not 0 < l2 < math.inf:
        raise UsageError(f"l2 must be positive, not {l2}")
    fitted = [
        _fit(normed(trace.hidden[:, column]), trace.agrees[:, column].float(), l2)
        for column in range(len(trace.exits))
    ]
    return GateWeights(
        exits=trace.exits,
        num_layers=trace.num_layers,
        fingerprint=trace.fingerprint,
        weights=torch.stack([weights for weights, _, _ in fitted]),
        biases=torch.stack([bias for _, bias, _ in fitted]),
        fitted_on={
            "tokens": len(trace.chosen),
            "texts": len(trace.lengths),
            "agreement": trace.agrees.float().mean(0).tolist(),
            "loss": [loss for _, _, loss in fitted],
        },
    )


@torch.enable_grad()
def _fit(states: Tensor, agrees: Tensor, l2: float) -> tuple[Tensor, Tensor, float]:
    """Return weights ``[D]``, bias and mean loss of one logistic regression on ``[T, D]``.

    In fp64: in fp32 the line search can circle around the minimum for minutes.
    """
    states, agrees = states.double(), agrees.double()
    mean, spread = states.mean(0), states.std(0, unbiased=False).clamp_min(_EPSILON)
    inputs = (states - mean) / spread
    right = agrees.sum()
    targets = torch.where(agrees > 0, (right + 1) / (right + 2), 1 / (len(agrees) - right + 2))
    weights = torch.zeros(states.shape[1], dtype=states.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=states.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        fit = functional.binary_cross_entropy_with_logits(inputs @ weights + bias, targets)
        total: Tensor = fit + l2 / 2 * weights.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    scaled = weights.detach() / spread
    offset = bias.detach() - scaled @ mean
    left = functional.binary_cross_entropy_with_logits(states @ scaled + offset, agrees).item()
    return scaled.float(), offset.float(), left


def normed(hidden: Tensor) -> Tensor:
    """Return states ``[S, D]`` in fp32 with root mean square 1: a gate must not see their scale."""
    states = hidden.float()
    return states * (states.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
