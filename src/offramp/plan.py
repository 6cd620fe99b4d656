"""Plans: the JSON record of how to run a model. What was calibrated is what is run.

A plan knows its model by fingerprint and refuses another one; unknown keys are refused, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path as FilePath
from typing import Annotated

from pydantic import Field

from offramp.backbone import Backbone, Shape
from offramp.certificate import Certificate, check_whole, checksum
from offramp.checks import FULL_HEAD, Check, FullHead, GateFile, Head, Refined
from offramp.control import remembered
from offramp.cost import check_in_heads
from offramp.decode import Way, decode
from offramp.errors import UsageError
from offramp.files import write_text
from offramp.probe import Readout
from offramp.records import Record, read_record
from offramp.request import Request, Token
from offramp.route import route
from offramp.runs import Adapt, Exit, Full, Path, Route, Run, Skip, Speculate
from offramp.sample import largest
from offramp.skipping import skip
from offramp.speculate import speculate

_NUMBERS = re.compile(r"\[\n[\d\s,.eE+-]+\]")
"""A list of numbers in indented JSON, whose texts have no line breaks."""


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
        """Whether the tokens are the full model's; of a path only known where its model is."""
        match self.run:
            case Path(head=FullHead() | Refined()) if self.model is not None:
                return self.run.layers == tuple(range(self.model.num_layers))
            case _:
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
        if self.model is not None and self.model.num_layers != backbone.shape.num_layers:
            raise UsageError(
                f"this plan says that {self.model.name} has {self.model.num_layers} layers, and it "
                f"has {backbone.shape.num_layers}: somebody changed it"
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
    """Write a plan as JSON, whole or not at all; a list of numbers takes one line."""
    text = _NUMBERS.sub(lambda found: " ".join(found[0].split()), plan.model_dump_json(indent=2))
    write_text(path, text + "\n")


def execute(
    backbone: Backbone, requests: Iterable[Request], run: Run, *, batch_size: int = 8
) -> Iterator[Token]:
    """Yield the new tokens of all requests, generated as the plan says.

    Where one of them looks at more than the largest logit (it samples, or has a penalty), the full
    head stands in for a refined one, for all; but not in a draft, which the full head confirms.
    """
    if isinstance(run, Full):
        return decode(backbone, requests, batch_size=batch_size)
    requests = list(requests)
    ends = {token for request in requests for token in request.eos}
    largest_only = all(request.choose is largest for request in requests)

    def chosen_by(head: Head) -> Readout | None:
        exact = FULL_HEAD if isinstance(head, Refined) and not largest_only else head
        return exact.choose(backbone, ends)

    match run:
        case Speculate():
            head = run.head.choose(backbone, ends)
            return speculate(backbone, requests, run.drafter, head=head, batch_size=batch_size)
        case Adapt():
            head = run.head.choose(backbone, ends)
            chooser = remembered(backbone, run.drafters, head=in_heads(run.head, backbone.shape))
            return speculate(backbone, requests, chooser, head=head, batch_size=batch_size)
        case Route():
            ways = [_way(backbone, one, chosen_by) for one in run.runs]
            return route(
                backbone, requests, run.weights, ways, price=run.price, batch_size=batch_size
            )
        case Skip():
            return skip(backbone, requests, run.weights, batch_size=batch_size)
        case _:
            way = _way(backbone, run, chosen_by)
            return decode(backbone, requests, **vars(way), batch_size=batch_size)


def _way(
    backbone: Backbone, run: Full | Exit | Path, chosen_by: Callable[[Head], Readout | None]
) -> Way:
    """Return how a plan runs whole texts."""
    match run:
        case Full():
            return Way()
        case Exit():
            return Way(
                run.policy,
                kv=run.kv,
                look=run.sees.look(backbone),
                exit_head=chosen_by(run.head),
                max_waiting=run.max_waiting,
                exit_prompt=run.exit_prompt,
            )
        case Path():
            return Way(layers=run.layers, head=chosen_by(run.head))
