"""What a comparison keeps of each group of items: both arms' answers, their work and their time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from offramp.machine import versions
from offramp.model import Model
from offramp.plan import Plan
from offramp.records import Record

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Answer(Record):
    """What one arm wrote to one item; of a text to read, the text itself."""

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    """Layers that chose each token."""
    text: str
    """Before a stop string, if one came; empty of a text to read."""
    loss: float | None
    """Mean cross-entropy of the tokens, in nats: under the full model, or, of a text to read, under
    what the arm says of it. None where one token was asked for."""


class Ran(Record):
    """What one arm did with a group."""

    answers: tuple[Answer, ...]
    seconds: Positive
    flops: Positive
    """Operations: layers, checks, fills, drafts and all."""
    full_flops: Positive
    """Operations of full depth over the very same tokens."""
    layer_rows: Count
    """Rows through whole layers."""
    full_layer_rows: Count


class Group(Record):
    """Some items of a task, answered by both arms one after the other."""

    task: str
    digest: str
    """Of all items that were asked."""
    number: Count
    plan: Ran
    full: Ran


def facts_of(model: Model, plan: Plan, **settings: Any) -> dict[str, Any]:
    """Return all that answers depend on; kept answers of other facts are not merged."""
    backbone, run = model.backbone, plan.run.model_dump(mode="json")
    return {
        "format": 1,
        "versions": versions(),
        "model": {"name": model.name, "fingerprint": backbone.fingerprint},
        "backbone": {"name": backbone.name, "weights": backbone.weights, "build": backbone.build},
        "plan": {"run": run, "files": _digests(run)},
        **settings,
    }


def _digests(value: Any) -> dict[str, str]:
    """Return the SHA-256 of each file that a plan names: gates, routers, lists of tokens."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return {name: digest for part in parts for name, digest in _digests(part).items()}
    if isinstance(value, str) and Path(value).is_file():
        return {value: hashlib.sha256(Path(value).read_bytes()).hexdigest()}
    return {}


def digest_of(value: Any) -> str:
    """Return the SHA-256 of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
