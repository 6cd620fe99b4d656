"""Plans: the JSON record of how to run a model. What was calibrated is what is run.

A plan knows its model by fingerprint and refuses another one; unknown keys are refused, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path as FilePath
from typing import Annotated, Literal

from pydantic import Field

from offramp.backbone import Backbone, Shape
from offramp.certificate import Certificate, check_whole, checksum
from offramp.checks import FULL_HEAD, Check, FullHead, GateFile, Head
from offramp.classifier import Classified, load_classifier
from offramp.control import check_drafts, controlled
from offramp.cost import check_in_heads
from offramp.decode import MAX_WAITING, Way, decode
from offramp.errors import UsageError
from offramp.files import write_text
from offramp.gate import Gate, load_gate
from offramp.paths import check_path
from offramp.policy import Threshold, check_exits
from offramp.records import Record, read_record
from offramp.request import Request, Token
from offramp.route import route
from offramp.router import RouterWeights, check_price, load_router
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
    head: Annotated[Head, Field(discriminator="kind")] = FULL_HEAD
    """What chooses the drafted tokens: where few layers run, reading the whole head is what costs.
    The full head confirms them, so no token depends on it."""

    @property
    def drafter(self) -> Draft:
        """Return the draft this describes."""
        return Draft(self.draft, self.tokens, self.min_confidence)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse a draft or a head that this model cannot make."""
        self.drafter.check(backbone.shape.num_layers)
        self.head.must_fit(backbone.shape)


class Adapt(Record):
    """Draft or not, with which layers and how far: chosen while decoding. Lossless."""

    kind: Literal["adapt"] = "adapt"
    drafts: tuple[tuple[int, ...], ...]
    """What a draft may run: several sets of layers."""
    tokens: Annotated[int, Field(ge=1, le=64)] = 4
    """Longest draft; 1, 2, 4 and so on are tried."""
    min_confidence: float = 0.0
    head: Annotated[Head, Field(discriminator="kind")] = FULL_HEAD
    """What chooses the drafted tokens."""

    @property
    def drafters(self) -> tuple[Draft, ...]:
        """Return the drafts to choose from."""
        lengths = sorted({*(2**i for i in range(self.tokens.bit_length())), self.tokens})
        return tuple(Draft(one, n, self.min_confidence) for one in self.drafts for n in lengths)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse drafts or a head that this model cannot make."""
        check_drafts(backbone, self.drafters)
        self.head.must_fit(backbone.shape)


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


Whole = Annotated[Full | Exit | Path, Field(discriminator="kind")]
"""One way to run a whole text: what a route chooses among."""


class Route(Record):
    """Choose one of several ways for each text, by the first layers of its prompt. Lossy."""

    kind: Literal["route"] = "route"
    router: str
    """The router's file."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of that file's bytes: another file is refused."""
    price: float
    """Predicted score that a layer per token has to be worth."""
    runs: tuple[Whole, ...]
    """The ways, as the router knows them."""

    @cached_property
    def weights(self) -> RouterWeights:
        """Return what the router has learnt.

        Raises:
            OfframpError: the file cannot be read, is none, or is not the one this was made with.
        """
        return load_router(FilePath(self.router), self.digest)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse a router of another model or of other ways, and ways it cannot look ahead of."""
        check_price(self.price)
        weights = self.weights
        weights.must_fit(backbone)
        if tuple(run.model_dump_json() for run in self.runs) != weights.runs:
            raise UsageError(
                f"the router {self.router} was fitted to choose among other ways to run than the "
                "plan names; fit it for these with 'offramp oracle --router'"
            )
        for run in self.runs:
            run.must_fit(backbone)
            _check_shared(run, weights, backbone)


def _check_shared(run: Full | Exit | Path, router: RouterWeights, backbone: Backbone) -> None:
    """Refuse a way whose prompt would not run the layers that a router looks through."""
    depth = router.depth
    match run:
        case Path() if run.layers[:depth] != tuple(range(depth)):
            raise UsageError(
                f"the router looks at the prompt after the first {depth} layers, and a path of "
                f"layers {list(run.layers)} does not begin with them"
            )
        case Exit() if run.exit_prompt:
            raise UsageError("a route looks at whole prompts: its runs cannot have exit_prompt")
        case Exit():
            passed = {*backbone.blocks} & {*run.policy.exits} - {*router.exits}
            if any(stop < depth for stop in passed):
                raise UsageError(
                    f"exit {min(passed)} has a block of its own that the prompt would pass "
                    f"unasked; let the router look there, too, or before it"
                )


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


Run = Full | Exit | Speculate | Adapt | Path | Route | Skip


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
    certificate: Certificate | None = None
    """What ``offramp calibrate`` guarantees of it; None for a plan made otherwise."""

    @property
    def lossless(self) -> bool:
        """Whether the tokens are the full model's."""
        return isinstance(self.run, Full | Speculate | Adapt)

    def check(self, backbone: Backbone) -> None:
        """Refuse a plan that is not for this model.

        Raises:
            UsageError: made for another model, or exits, layers or thresholds it does not have; or
                changed after it was certified.
        """
        if self.certificate is not None:
            check_whole(self, self.certificate, backbone.weights)
        if self.model is not None and self.model.fingerprint != backbone.fingerprint:
            raise UsageError(
                f"this plan was made for {self.model.name} ({self.model.num_layers} layers, "
                f"fingerprint {self.model.fingerprint}), not for this model "
                f"({backbone.shape.num_layers} layers, fingerprint {backbone.fingerprint})"
            )
        self.run.must_fit(backbone)


def sealed(plan: Plan, certificate: Certificate) -> Plan:
    """Return the plan with its certificate, and the checksum over both."""
    whole = certificate.model_copy(update={"checksum": checksum(plan, certificate)})
    return plan.model_copy(update={"certificate": whole})


def check_of(plan: Plan) -> Check:
    """Return what reads states in place of the full head: an exit's check, or the head of a
    sub-model or a draft."""
    match plan.run:
        case Exit():
            return plan.run.sees
        case Path() | Speculate() | Adapt():
            return plan.run.head
        case _:
            return FULL_HEAD


def in_heads(check: Check, shape: Shape) -> float:
    """Return the price of looking through this, one readout of the full head = 1."""
    return 1.0 if check == FULL_HEAD else check_in_heads(shape, check.weights(shape))


def reading(check: Check, head: Head, shape: Shape) -> tuple[float, float]:
    """Return the price of asking a token, and of then choosing it if it leaves; 1 = a readout."""
    asking = 0.0 if isinstance(check, GateFile) else in_heads(check, shape)
    return asking, 0.0 if check == head else in_heads(head, shape)


def cheap_weights(plan: Plan, shape: Shape) -> int:
    """Return the matrix weights that one row of the plan's cheap head multiplies; 0 for none.

    Of a route, the most of any of its ways: counted rows do not say which way they went.
    """
    if isinstance(plan.run, Route):
        return max(cheap_weights(Plan(run=run), shape) for run in plan.run.runs)
    heads = [plan.run.check, plan.run.head] if isinstance(plan.run, Exit) else [check_of(plan)]
    return max(head.weights(shape) for head in heads)


def read_plan(path: FilePath) -> Plan:
    """Return the plan in a JSON file.

    Raises:
        OfframpError: it cannot be read or is no plan; the first thing wrong is named.
        UsageError: it was changed after it was certified.
    """
    plan = read_record(path, Plan, "plan")
    if plan.certificate is not None:
        check_whole(plan, plan.certificate)
    return plan


def write_plan(path: FilePath, plan: Plan) -> None:
    """Write a plan as JSON, whole or not at all."""
    write_text(path, plan.model_dump_json(indent=2) + "\n")


def execute(
    backbone: Backbone, requests: Iterable[Request], run: Run, *, batch_size: int = 8
) -> Iterator[Token]:
    """Yield the new tokens of all requests, generated as the plan says."""
    if isinstance(run, Full):
        return decode(backbone, requests, batch_size=batch_size)
    requests = list(requests)
    ends = {token for request in requests for token in request.eos}
    match run:
        case Speculate():
            head = run.head.choose(backbone, ends)
            return speculate(backbone, requests, run.drafter, head=head, batch_size=batch_size)
        case Adapt():
            head = run.head.choose(backbone, ends)
            chooser = controlled(backbone, run.drafters, head=in_heads(run.head, backbone.shape))
            return speculate(backbone, requests, chooser, head=head, batch_size=batch_size)
        case Route():
            ways = [way_of(backbone, one, ends) for one in run.runs]
            return route(
                backbone, requests, run.weights, ways, price=run.price, batch_size=batch_size
            )
        case Skip():
            return skip(backbone, requests, run.weights, batch_size=batch_size)
        case _:
            way = way_of(backbone, run, ends)
            return decode(backbone, requests, **vars(way), batch_size=batch_size)


def way_of(backbone: Backbone, run: Full | Exit | Path, ends: Collection[int]) -> Way:
    """Return how a plan runs whole texts that end with these tokens."""
    match run:
        case Full():
            return Way()
        case Exit():
            return Way(
                run.policy,
                kv=run.kv,
                look=run.sees.look(backbone),
                exit_head=run.head.choose(backbone, ends),
                max_waiting=run.max_waiting,
                exit_prompt=run.exit_prompt,
            )
        case Path():
            return Way(layers=run.layers, head=run.head.choose(backbone, ends))
