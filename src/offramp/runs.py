"""Ways to run a model, as data: what a plan may ask for. Each refuses a model it does not fit."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path as FilePath
from typing import Annotated, Literal

from pydantic import Field

from offramp.backbone import Backbone, must_halve
from offramp.checks import FULL_HEAD, Check, FullHead, GateFile, Head
from offramp.classifier import Classified, load_classifier
from offramp.control import check_drafts
from offramp.decode import MAX_WAITING
from offramp.errors import UsageError
from offramp.gate import Gate, load_gate
from offramp.paths import Part, check_parts, check_path
from offramp.policy import Threshold, check_exits
from offramp.records import Record
from offramp.router import RouterWeights, check_price, load_router
from offramp.skipping import SkipGates, load_skip_gates
from offramp.speculate import Draft


class Full(Record):
    """Every layer for every token."""

    kind: Literal["full"] = "full"

    def must_fit(self, backbone: Backbone) -> None:
        """Accept any model."""


class Exit(Record):
    """Leave at the first exit whose signal reaches its threshold. Lossy.

    With a short ``head`` the last layer may be an exit, too: a token that leaves there is spared
    the full head.
    """

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
            return Gate(load_gate(FilePath(self.check.file), self.check.digest), thresholds)
        if self.classifier is not None:
            return Classified(load_classifier(FilePath(self.classifier)), thresholds)
        return Threshold(self.signal, thresholds)

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse exits, thresholds or a check that make no sense for this model."""
        if not self.thresholds:
            raise UsageError("a plan that exits needs at least one exit with a threshold")
        short = not isinstance(self.head, FullHead)
        check_exits(self.policy.exits, backbone.shape.num_layers, short_head=short)
        self.check.must_fit(backbone.shape)
        self.head.must_fit(backbone.shape)
        looks = isinstance(self.check, FullHead | GateFile) or self.check == self.head
        if short and not looks:
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
    draft: tuple[Part, ...]
    """The layers the draft runs; of one, perhaps its attention ("7a") or its MLP ("7m") alone."""
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
        must_halve(backbone, self.draft)
        self.head.must_fit(backbone.shape)


class Adapt(Record):
    """Draft or not, with which layers and how far: chosen while decoding. Lossless."""

    kind: Literal["adapt"] = "adapt"
    drafts: tuple[tuple[Part, ...], ...]
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
    layers: tuple[Part, ...]
    """Of a layer, perhaps its attention ("7a") or its MLP ("7m") alone."""
    head: Annotated[Head, Field(discriminator="kind")] = FULL_HEAD
    """What chooses the tokens: where few layers run, reading the whole head is what costs."""

    def must_fit(self, backbone: Backbone) -> None:
        """Refuse layers or a head that this model lacks."""
        check_parts(self.layers, backbone.shape.num_layers)
        must_halve(backbone, self.layers)
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
            if isinstance(run, Path):  # prompts wait on their paths, in front of a whole layer
                check_path(run.layers, backbone.shape.num_layers)
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
