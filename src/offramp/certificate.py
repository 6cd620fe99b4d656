"""What a calibrated plan says of itself, and a checksum that tells when either was changed."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from offramp.errors import UsageError
from offramp.records import Record

Rate = Annotated[float, Field(gt=0, lt=1)]
Mean = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class HeldOut(Record):
    """Sequences that were looked at once, after the certificate."""

    n: Count
    risk: Mean


class Drift(Record):
    """What the policy's own text loses, beside the full model's text for the same prompts."""

    n: Count
    full_text: Mean
    """Risk on text that the full model wrote: what certificates are about."""
    own_text: Mean
    """Risk on the text that the policy wrote, replayed under the full model; for ``loss`` the nats
    per token that the full model loses on it against the depths that wrote it."""

    @property
    def gap(self) -> float:
        """Return by how much the policy's own text is worse."""
        return self.own_text - self.full_text


class Certificate(Record):
    """P(risk > alpha) <= delta over the draw of n sequences; or, conformal, E(risk) <= alpha."""

    risk: Literal["disagreement", "divergence", "loss", "error"]
    alpha: Rate
    delta: Rate | None
    """None by conformal risk control, which bounds an expectation."""
    method: Literal["hoeffding-bentkus", "binomial", "betting", "conformal"]
    n: Count
    """Sequences that were tested."""
    value: Annotated[float, Field(ge=0)]
    """The p-value; the bound on the expected risk by conformal risk control."""
    settings: Count
    """Joint threshold settings that were replayed."""
    cost: Annotated[float, Field(ge=0)]
    """Predicted per token, full depth = 1."""
    measured: bool
    """Whether that is time, measured on the machine; else weights read."""
    weights: str
    """How the model's weights were held: an int4 model's tokens are not the fp32 model's."""
    data: dict[str, str]
    """SHA-256 of what it was calibrated on, by name."""
    seed: int
    """Of the split."""
    held_out: HeldOut
    drift: Drift | None = None
    """None where it was not measured."""
    checksum: str = ""
    """SHA-256 of the plan with this certificate, but for this line."""


def checksum(plan: BaseModel, certificate: Certificate) -> str:
    """Return the SHA-256 of a plan, its certificate with it, in one way of writing it.

    It tells accidents and careless edits; who means to deceive can compute it anew.
    """
    bare = plan.model_copy(update={"certificate": certificate.model_copy(update={"checksum": ""})})
    text = json.dumps(bare.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_whole(plan: BaseModel, certificate: Certificate, weights: str | None = None) -> None:
    """Refuse a plan that is no more what was certified.

    Args:
        plan: the plan.
        certificate: its certificate.
        weights: how the model that is to run it holds its weights.

    Raises:
        UsageError: something in it was changed since, or the weights are held in another way.
    """
    if certificate.checksum != checksum(plan, certificate):
        raise UsageError(
            "this plan was changed after it was certified, so its certificate says nothing of it; "
            'calibrate again, or remove "certificate" to run it without a guarantee'
        )
    if weights is not None and weights != certificate.weights:
        raise UsageError(
            f"this plan was certified with {certificate.weights} weights, not with {weights}; open "
            f"the model with {certificate.weights} weights, or calibrate again"
        )
