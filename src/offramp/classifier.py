"""Stored classifiers: stop or go on, by a few scores of an exit (AdaInfer); evaluated in torch.

AdaInfer (Fan et al. 2024) leaves a frozen model where a classical classifier says that the layers
so far have found the answer. A linear classifier (a support vector machine, a logistic regression)
scores an exit by its features alone. A linear-chain conditional random field (Lafferty et al. 2001)
also knows what it thought one exit before; it is read causally, over the exits up to now. How they
are fitted is in :mod:`offramp.adainfer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offramp.backbone import Backbone
from offramp.errors import OfframpError, UsageError
from offramp.features import check_features, features, looks_back
from offramp.files import digest_of, write_tensors
from offramp.probe import Probe
from offramp.records import Record

Kind = Literal["svm", "logistic", "crf", "rule"]
Label = Literal["final", "gold", "stable"]

_KEY, _DIGEST = "offramp_classifier", "sha256"
_MOST_BYTES = 2**24


class Facts(Record):
    """What a stored classifier says of itself, as JSON in the file's header."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    kind: Kind
    label: Label
    """When it was right to leave: see :func:`offramp.adainfer.labels.labels`."""
    features: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]
    """Names of signals, or ``depth``."""
    exits: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    num_layers: int
    fingerprint: str
    """Of the model it was fitted on."""
    check: str
    """What its features were computed from, as the check calls itself."""
    pooled: bool
    """Whether all exits share one set of weights."""
    fitted_on: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _exits_and_features(self) -> Facts:
        if any(b <= a for a, b in pairwise(self.exits)) or self.exits[-1] >= self.num_layers:
            raise ValueError("exits ascend, and end before the last layer")
        if len(set(self.features)) < len(self.features):
            raise ValueError("a feature is named twice")
        return self


@dataclass(frozen=True, eq=False)
class Classifier:
    """What was learnt, exit by exit, and of which model. E exits, F features."""

    facts: Facts
    weights: Tensor
    """``[E, F]`` fp64, on the features as they are."""
    biases: Tensor
    """``[E]`` fp64."""
    transitions: Tensor
    """``[2, 2]`` fp64: of a conditional random field, from (go on, stop) to (go on, stop); else 0.
    """

    @property
    def looks_back(self) -> bool:
        """Return whether a score depends on which exits there are before."""
        return self.facts.kind == "crf" or any(map(looks_back, self.facts.features))

    def score(self, probe: Probe) -> Tensor:
        """Return ``[S]`` fp64: above 0 where the classifier says stop.

        A support vector machine's distance from its plane, the log-odds of a logistic regression
        or of a conditional random field given the exits up to this one; of the rule, the gap less
        its bar. NaN where a feature is.
        """
        if self._name not in probe.scores:
            row = self.facts.exits.index(probe.depth)
            rows = features(probe, self.facts.features)
            weights, bias = self.weights[row].to(rows.device), self.biases[row].to(rows.device)
            found = rows @ weights + bias
            if self.facts.kind == "crf" and probe.previous is not None:
                found = found + carried(self.score(probe.previous), self.transitions)
            probe.scores[self._name] = found
        return probe.scores[self._name]

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of everything it is, by which a changed file is known."""
        tensors = (self.weights, self.biases, self.transitions)
        return digest_of(self.facts.model_dump_json(), tensors)

    @property
    def _name(self) -> str:
        """How a probe keeps its score: no signal is called so."""
        return f"classifier {self.digest}"

    def must_fit(self, backbone: Backbone, check: str) -> None:
        """Refuse another model, or another check, than it was fitted with.

        Raises:
            UsageError: the model's fingerprint differs, or the check does.
        """
        if self.facts.fingerprint != backbone.fingerprint:
            raise UsageError(
                f"this classifier was fitted on a model of {self.facts.num_layers} layers and "
                f"fingerprint {self.facts.fingerprint}, not on this one (fingerprint "
                f"{backbone.fingerprint})"
            )
        if self.facts.check != check:
            raise UsageError(
                f"this classifier was fitted on scores seen by the check {self.facts.check}, and "
                f"here {check} would look: use that check, or fit another classifier"
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all, its facts as JSON in the header."""
        tensors = {
            "weights": self.weights.contiguous(),
            "biases": self.biases.contiguous(),
            "transitions": self.transitions.contiguous(),
        }
        write_tensors(path, tensors, {_KEY: self.facts.model_dump_json(), _DIGEST: self.digest})


def carried(before: Tensor, transitions: Tensor) -> Tensor:
    """Return what log-odds ``[S]`` at one exit add to those at the next, ``[S]``.

    One step of the forward algorithm (Rabiner 1989, section III.A) for two labels: with
    ``r = exp(before)`` the log of ``(r e^T11 + e^T01) / (r e^T10 + e^T00)``.
    """
    from_go, from_stop = transitions.to(before.device)
    stop = torch.logaddexp(before + from_stop[1], from_go[1])
    return stop - torch.logaddexp(before + from_stop[0], from_go[0])


@dataclass(frozen=True, eq=False)
class Classified:
    """The policy: leave at the first exit where the classifier's score reaches its threshold."""

    classifier: Classifier
    thresholds: tuple[tuple[int, float], ...]
    """(depth, lowest score that leaves), ascending by depth; 0 is the classifier's own word."""

    bars = None  # no threshold of one score: it is asked at every exit

    def __post_init__(self) -> None:
        fitted = self.classifier.facts.exits
        for depth, value in self.thresholds:
            if depth not in fitted:
                raise UsageError(
                    f"the classifier knows no exit {depth}, only {', '.join(map(str, fitted))}"
                )
            if math.isnan(value):
                raise UsageError(f"the threshold at exit {depth} is not a number")
        if self.classifier.looks_back and self.exits != fitted[: len(self.exits)]:
            raise UsageError(
                f"this classifier looks back: it must be asked at every exit that it was fitted "
                f"at, {', '.join(map(str, fitted))}, up to the last one used"
            )

    @property
    def exits(self) -> tuple[int, ...]:
        """Return the depths that have a threshold."""
        return tuple(depth for depth, _ in self.thresholds)

    def leave(self, probe: Probe) -> Tensor:
        """Return where the score reaches the threshold of this depth; never where it is NaN."""
        return self.classifier.score(probe) >= dict(self.thresholds)[probe.depth]


def load_classifier(path: Path) -> Classifier:
    """Return the classifier in a file.

    Raises:
        OfframpError: it cannot be read, is none, was changed since it was written, or needs a
            signal that is not installed.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = Classifier(Facts.model_validate_json(said[_KEY]), **parts)
        _check_parts(found)
    except OSError as error:
        raise OfframpError(f"cannot read the classifier {path}: {error.strerror}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise OfframpError(f"{path} is no offramp classifier: {where} {wrong['msg']}") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise OfframpError(f"{path} is no offramp classifier") from error
    if found.digest != said.get(_DIGEST):
        raise OfframpError(
            f"{path} was changed since it was written: its digest is not that of its content; fit "
            "it again"
        )
    try:
        check_features(found.facts.features)
    except UsageError as error:
        raise OfframpError(f"{path} needs a signal that is not installed: {error}") from error
    return found


def _check_parts(found: Classifier) -> None:
    """Refuse what does not go together; the caller says of which file."""
    exits, names = len(found.facts.exits), len(found.facts.features)
    shapes = [(exits, names), (exits,), (2, 2)]
    tensors = [found.weights, found.biases, found.transitions]
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float64 or not tensor.isfinite().all():
            raise ValueError("parts do not go together")
