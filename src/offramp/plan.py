"""Plans: the JSON record of how to run a model. What was calibrated is what is run.

A plan knows its model by fingerprint and refuses another one; unknown keys are refused, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path as FilePath
from typing import Annotated, Literal

from pydantic import Field

from offramp.backbone import Backbone, Shape
from offramp.checks import FULL_HEAD, Check, FullHead, GateFile, Head
from offramp.classifier import Classified, load_classifier
from offramp.decode import MAX_WAITING, decode
from offramp.errors import UsageError
from offramp.files import write_text
from offramp.gate import Gate, load_gate
from offramp.paths import check_path
from offramp.policy import Threshold, check_exits
from offramp.records import Record, read_record
from offramp.request import Request, Token
from offramp.skipping import SkipGates, load_skip_gates, skip
from offramp.speculate import Draft, speculate


class Full(Record):
    """Every layer for every token."""

    kind: Literal["full"] = "full"

    def must_fit(self, backbone: Backbone) -> None:
        """Accept any model."""


class Exit(Record):
    """Leave at the first exit whose signal reaches its threshold. Lossy."""

    kind: Literal["exit"] = "exit"
    signal: str
    thresholds: dict[int, float]
    """Lowest score that leaves, by exit."""
    kv: Literal["exact", "copy"] = "exact"
    max_waiting: Annotated[int, Field(ge=1)] = MAX_WAITING
    exit_prompt: bool = False
    """Whether the prompt, too, may leave early (for one-token answers)."""
    check: Annotated[Check, Field(discriminator="kind")] = FULL_HEAD
    """What the signal is computed from; with a gate, the signal is ``gate``."""
    classifier: str | None = None
    """Path of a stored classifier, from the folder the program runs in; its score is the signal
    ``classifier``."""
    head: Annotated[Head, Field(discriminator="kind")] = FULL_HEAD
    """What chooses the token of a row that leaves; a full check then looks at that, too."""

    @property
    def sees(self) -> Check:
        """Return what the signal really looks at."""
        return self.head if isinstance(self.check, FullHead) else self.check

    @cached_property
    def policy(self) -> Threshold | Gate | Classified:
        """Return the policy this describes.

        Raises:
            UsageError: an unknown signal, or a threshold out of its range.
            OfframpError: the gates or the classifier cannot be read.
        """
        thresholds = tuple(sorted(self.thresholds.items()))
        if (self.classifier is None) == (self.signal == "classifier"):
            raise UsageError(
                "'classifier' thresholds need the file of a classifier, and a classifier has no "
                f"other signal, such as {self.signal!r}"
            )
        if isinstance(self.check, GateFile) != (self.signal == "gate"):
            raise UsageError(
                f"the signal {self.signal!r} does not go with the check {self.check}: 'gate' "
                "thresholds need a gate, and a gate has no other signal"
            )
        if isinstance(self.check, GateFile):
            return Gate(load_gate(FilePath(self.check.file)), thresholds)
        if self.classifier is not None:
            return Classified(load_classifier(FilePath(self.classifier)), thresholds)
        return Threshold(self.signal, thresholds)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse exits, thresholds or a check that make no sense for this model."""
        if not self.thresholds:
            raise UsageError("a plan that exits needs at least one exit with a threshold")
        check_exits(self.policy.exits, backbone.shape.num_layers)
        self.check.must_fit(backbone.shape)
        self.head.must_fit(backbone.shape)
        looks = isinstance(self.check, FullHead | GateFile) or self.check == self.head
        if not isinstance(self.head, FullHead) and not looks:
            raise UsageError(
                f"where {self.head} chooses the tokens that leave, a check by {self.check} would "
                "be a second cheap head: check by the same one, by the full one or by a gate"
            )
        if isinstance(self.policy, Gate):
            self.policy.weights.must_fit(backbone)
        if isinstance(self.policy, Classified):
            self.policy.classifier.must_fit(backbone, str(self.sees))


class Speculate(Record):
    """Draft with some of the layers, confirm with all. Lossless."""

    kind: Literal["speculate"] = "speculate"
    draft: tuple[int, ...]
    """The layers the draft runs."""
    tokens: int = 4
    min_confidence: float = 0.0

    @property
    def drafter(self) -> Draft:
        """Return the draft this describes."""
        return Draft(self.draft, self.tokens, self.min_confidence)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse a draft that a model of this depth cannot make."""
        self.drafter.check(backbone.shape.num_layers)


class Path(Record):
    """Some layers for every token: a sub-model. Lossy."""

    kind: Literal["path"] = "path"
    layers: tuple[int, ...]
    head: Annotated[Head, Field(discriminator="kind")] = FULL_HEAD
    """What chooses the tokens: where few layers run, reading the whole head is what costs."""

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse layers or a head that this model lacks."""
        check_path(self.layers, backbone.shape.num_layers)
        self.head.must_fit(backbone.shape)


class Skip(Record):
    """Pass layers by, token by token, where gates say so. Lossy."""

    kind: Literal["skip"] = "skip"
    gates: str
    """Path of the skip gates, from the folder the program runs in."""

    @cached_property
    def weights(self) -> SkipGates:
        """Return the gates.

        Raises:
            OfframpError: they cannot be read.
        """
        return load_skip_gates(FilePath(self.gates))

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse gates of a model of another shape."""
        self.weights.must_fit(backbone)


Run = Full | Exit | Speculate | Path | Skip


class ModelId(Record):
    """Which model a plan is for."""

    name: str
    num_layers: int
    fingerprint: str


class Plan(Record):
    """How to run a model."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    model: ModelId | None = None
    """The model it was made for; None for a plan made by hand, which fits where its layers do."""
    run: Annotated[Run, Field(discriminator="kind")] = Full()

    @property
    def lossless(self) -> bool:
        """Whether the tokens are the full model's."""
        return isinstance(self.run, Full | Speculate)

    def check(self, backbone: Backbone) -> None:
        """Refuse a plan that is not for this model.

        Raises:
            UsageError: made for another model, or exits, layers or thresholds it does not have.
        """
        if self.model is not None and self.model.fingerprint != backbone.fingerprint:
            raise UsageError(
                f"this plan was made for {self.model.name} ({self.model.num_layers} layers, "
                f"fingerprint {self.model.fingerprint}), not for this model "
                f"({backbone.shape.num_layers} layers, fingerprint {backbone.fingerprint})"
            )
        self.run.must_fit(backbone)


def check_of(plan: Plan) -> Check:
    """Return what reads states in place of the full head: an exit's check, a sub-model's head."""
    match plan.run:
        case Exit():
            return plan.run.sees
        case Path():
            return plan.run.head
        case _:
            return FULL_HEAD


def cheap_weights(plan: Plan, shape: Shape) -> int:
    """Return the matrix weights that one row of the plan's cheap head multiplies; 0 for none."""
    heads = [plan.run.check, plan.run.head] if isinstance(plan.run, Exit) else [check_of(plan)]
    return max(head.weights(shape) for head in heads)


def read_plan(path: FilePath) -> Plan:
    """Return the plan in a JSON file.

    Raises:
        OfframpError: it cannot be read or is no plan; the first thing wrong is named.
    """
    return read_record(path, Plan, "plan")


def write_plan(path: FilePath, plan: Plan) -> None:
    """Write a plan as JSON, whole or not at all."""
    write_text(path, plan.model_dump_json(indent=2) + "\n")


def execute(
    backbone: Backbone, requests: Iterable[Request], run: Run, *, batch_size: int = 8
) -> Iterator[Token]:
    """Yield the new tokens of all requests, generated as the plan says."""
    match run:
        case Full():
            return decode(backbone, requests, batch_size=batch_size)
        case Exit():
            requests = list(requests)
            ends = {token for request in requests for token in request.eos}
            return decode(
                backbone,
                requests,
                run.policy,
                kv=run.kv,
                look=run.sees.look(backbone),
                exit_head=run.head.choose(backbone, ends),
                max_waiting=run.max_waiting,
                exit_prompt=run.exit_prompt,
                batch_size=batch_size,
            )
        case Path():
            requests = list(requests)
            ends = {token for request in requests for token in request.eos}
            head = run.head.choose(backbone, ends)
            return decode(backbone, requests, layers=run.layers, head=head, batch_size=batch_size)
        case Skip():
            return skip(backbone, requests, run.weights, batch_size=batch_size)
        case Speculate():
            return speculate(backbone, requests, run.drafter, batch_size=batch_size)
